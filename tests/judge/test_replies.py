import json
import math

import pytest

from huatuo_jax.judge import replies
from huatuo_jax.judge.judgements import CRITERIA
from huatuo_jax.judge.replies import BadReply, Token

GOOD = {name: {"reason": f"因{name}", "score": 2 + (name == "coherent")} for name in CRITERIA}


def text_of(**changed):
    return json.dumps({**GOOD, **changed}, ensure_ascii=False)


def parse(text):
    return replies.parse_score(text, low=1, high=5)


@pytest.mark.parametrize(
    "text",
    [
        text_of(),
        f"\n {text_of()} \n",
        f"```json\n{text_of()}\n```",
        f"```\n{text_of()}\n```\n",
        f"<think>也许 {{5}} 分？</think>\n\n{text_of()}",
        f"```JSON\n{text_of()}\n```",
        f"```json {text_of()}```",
        f"```{text_of()}```",
        f"``` Json\r\n{text_of()}\r\n```\r\n",
        f"评分如下：\n```json\n{text_of()}\n```",
        f"格式是 ```json {{}}```，评分：\n```json\n{text_of()}\n```",
        f"\ufeff{text_of()}",
        f"\u200b\ufeff```json\n\ufeff{text_of()}\n```",
        # The template opens the thoughts in the prompt.
        f"也许 5 分？\n</think>\n\n{text_of()}",
        f"草稿 ```json {{}}``` 不好</think>```json\n{text_of()}\n```",
        f"他写了 </think> 吗？</think>{text_of()}",
        f"<THINK>嗯</THINK>{text_of()}",
        f"◁think▷嗯◁/think▷{text_of()}",
        f"[THINK]嗯[/THINK]{text_of()}",
        f"<unused94>thought\n嗯<unused95>{text_of()}",
        f"## Thinking\n\n嗯\n\n## Final Response\n\n{text_of()}",
    ],
)
def test_scores_are_read_from_json_bare_or_fenced_or_behind_thoughts(text):
    found = parse(text)
    assert found.scores == {name: 2.0 + (name == "coherent") for name in CRITERIA}
    assert found.reason.splitlines()[0] == "informative: 因informative"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("  \n", "empty"),
        ("这条回答很好，5 分。", "not JSON"),
        (text_of()[:60], "not JSON"),
        (f"好的：{text_of()}", "not JSON"),
        (f"{text_of()} 以上。", "not JSON"),
        (f"{text_of()}{text_of()}", "not JSON"),
        (f"```json\n{text_of()}\n``` 以上。", "not JSON"),
        (f"```json\n{text_of()}", "not JSON"),
        ("\ufeff\u200b \n", "empty"),
        (f"<think>草稿 {text_of()}", "thoughts and no answer"),
        (f"<think>草稿 ```json {text_of()}```", "thoughts and no answer"),
        (f"好。<think>草稿 ```json {text_of()}```", "not JSON"),
        (f"<think>草稿 {text_of()}</think>", "thoughts and no answer"),
        (f"草稿 {text_of()}</think> \n", "not JSON"),
        ("```{" * 20_000, "not JSON"),
        ("</think>" * 20_000, "not JSON"),
        ('{"informative": ' + "1" * 5000 + "}", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ("4", "not a JSON object"),
        ("{}", "lacks informative"),
        (text_of(extra=1), "unknown field extra"),
        (text_of(overall=4), "overall is 4, not an object"),
        (text_of(overall={"score": 4}), "overall lacks reason"),
        (text_of(overall={"reason": "x", "score": 4, "p": 1}), "overall has an unknown field p"),
        (text_of(overall={"reason": 1, "score": 4}), "the reason of overall is 1"),
        (text_of(overall={"reason": "x", "score": "4"}), "the score of overall is 4, not a whole"),
        (text_of(overall={"reason": "x", "score": True}), "the score of overall is True"),
        (text_of(overall={"reason": "x", "score": 4.0}), "the score of overall is 4.0"),
        (text_of(overall={"reason": "x", "score": None}), "the score of overall is None"),
        (text_of(overall={"reason": "x", "score": 10}), "10, outside 1 to 5"),
        (text_of(overall={"reason": "x", "score": 0}), "0, outside 1 to 5"),
        (text_of(overall={"reason": "x", "score": float("nan")}), "NaN for a number"),
        (text_of()[:-1] + ', "overall": {"reason": "x", "score": 5}}', "a field twice"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_anything_else_is_no_score(text, why):
    with pytest.raises(BadReply, match=why):
        parse(text)


@pytest.mark.parametrize(("better", "p_first"), [(1, 1.0), (2, 0.0), (0, 0.5)])
def test_a_verdict_is_read_as_a_probability(better, p_first):
    found = replies.parse_verdict(json.dumps({"reason": "因为", "better": better}))
    assert found == (p_first, "因为")


def test_a_mark_inside_the_answers_own_words_changes_nothing():
    for mark in ("</think>", "```", "```json {", '</think>{"reason":"x","better":1}', "<think>"):
        text = json.dumps({"reason": f"他写了 {mark} 。", "better": 2})
        for whole in (text, f"<think>嗯</think>{text}", f"嗯</think>{text}", f"好：```{text}```"):
            assert replies.parse_verdict(whole).p_first == 0.0, whole


@pytest.mark.parametrize(
    "reason", [None, "", "stop", "STOP", "eos_token", "end_turn", "FinishReason.STOP", "什么"]
)
def test_a_reply_that_came_to_its_own_end_is_taken_in_any_servers_words(reason):
    replies.check_ending(reason)


@pytest.mark.parametrize(
    ("reason", "failure"),
    [
        ("length", "truncated"),
        ("MAX_TOKENS", "truncated"),
        ("model_length", "truncated"),
        ("content_filter", "refused"),
        ("SAFETY", "refused"),
        ("refusal", "refused"),
        ("sensitive", "refused"),
        ("tool_calls", "unreadable"),
        ("error", "unreadable"),
        ("insufficient_system_resource", "unreadable"),
    ],
)
def test_a_reply_that_was_cut_or_withheld_is_none(reason, failure):
    with pytest.raises(BadReply, match=f"ended for the reason '{reason}'") as error:
        replies.check_ending(reason)
    assert error.value.failure == failure


@pytest.mark.parametrize("better", ["1", 3, -1, 1.0, True, None, "第一"])
def test_anything_else_is_no_verdict(better):
    with pytest.raises(BadReply, match="better is"):
        replies.parse_verdict(json.dumps({"reason": "因为", "better": better}))


def tokens_of(pieces, alternatives):
    """Tokens of which the one that holds the last digit has alternatives."""
    tokens = [Token(piece.encode(), {piece.encode(): -0.01}) for piece in pieces]
    place = max(index for index, piece in enumerate(pieces) if any(map(str.isdigit, piece)))
    logs = {text.encode(): math.log(p) for text, p in alternatives.items()}
    tokens[place] = Token(pieces[place].encode(), logs)
    return tokens


@pytest.mark.parametrize(
    ("pieces", "alternatives", "expected"),
    [
        (['{"reason":"x","better":', "1", "}"], {"1": 0.6, "2": 0.2, "x": 0.2}, 0.75),
        (['{"reason":"x","better":', " 2}"], {" 2}": 0.5, " 1}": 0.25, " 0}": 0.25}, 0.375),
        (['{"reason":"x", "better"', ": 2", "}"], {": 2": 0.9, ": 1": 0.1, "1": 0.0001}, 0.1),
        (['{"reason":"x","better":', "1", "}"], {"1": 1.0}, 1.0),
        # What the reason says is not the verdict.
        (['{"reason":"\\"better\\": 2","better":', "1", "}"], {"1": 0.7, "2": 0.3}, 0.7),
    ],
)
def test_the_verdicts_share_of_probability_is_renormalised(pieces, alternatives, expected):
    p_first = replies.verdict_probability(tokens_of(pieces, alternatives), "".join(pieces))
    assert p_first == pytest.approx(expected, abs=1e-12)


TEXT = '{"reason":"x","better":1}'


@pytest.mark.parametrize("written", ["better", "thoughts"])
def test_thoughts_that_quote_a_verdict_do_not_count(written):
    """The server may leave the thoughts out of the text, and have them among the tokens."""
    thoughts = [Token(b'<think>say {"reason":"x","better":', {}), Token(b"1", {b"1": -0.007})]
    answer = ['{"reason":"x","better":', "2", "}"]
    tokens = [*thoughts, Token(b"}?</think>", {}), *tokens_of(answer, {"2": 0.95, "1": 0.05})]
    text = "".join(answer)
    if written == "thoughts":
        text = '<think>say {"reason":"x","better":1}?</think>' + text
    assert replies.verdict_probability(tokens, text) == pytest.approx(0.05, abs=1e-12)
    with pytest.raises(BadReply, match="do not hold its verdict"):  # The thoughts alone.
        replies.verdict_probability(tokens[:3], TEXT)


def test_tokens_that_cut_through_the_reason_still_show_the_verdict():
    pieces = ['{"reason":"\ufffd","better":', "2", "}"]  # As a server without bytes writes halves.
    text = '{"reason":"因为","better":2}'
    p_first = replies.verdict_probability(tokens_of(pieces, {"2": 0.75, "1": 0.25}), text)
    assert p_first == pytest.approx(0.25, abs=1e-12)


@pytest.mark.parametrize(
    ("better", "alternatives", "why"),
    [
        (1, {"1": 0.2, "2": 0.2, "x": 0.6}, "0.400 of the probability"),
        (1, {"1": 0.3, "2": 0.7}, "the verdict is 1, but"),
        (2, {"1": 0.51, "2": 0.49}, "the verdict is 2, but"),
        (0, {"0": 0.1, "1": 0.8, "2": 0.1}, "the verdict is 0, but"),
        (1, {"12": 1.0}, "0.000 of the probability"),
        (1, {"1": 1.0, "1 ": 1.0}, "2.000 of the probability"),
        (1, {}, "0.000 of the probability"),
    ],
)
def test_a_probability_that_is_none_or_contradicts_the_verdict_is_refused(
    better, alternatives, why
):
    pieces = ['{"reason":"x","better":', str(better), "}"]
    with pytest.raises(BadReply, match=why):
        replies.verdict_probability(tokens_of(pieces, alternatives), "".join(pieces))


def test_log_probabilities_that_are_no_numbers_or_not_of_the_reply_are_refused():
    def tokens(alternatives):
        return [Token(b'{"reason":"x","better":', {}), Token(b"1", alternatives), Token(b"}", {})]

    with pytest.raises(BadReply, match="nan of the probability"):
        replies.verdict_probability(tokens({b"1": math.nan, b"2": -1.0}), TEXT)
    with pytest.raises(BadReply, match="of the probability"):
        replies.verdict_probability(tokens({b"1": 800.0}), TEXT)
    for wrong in (tokens({b"1": -0.1})[:1], tokens({b"1": -0.1})[1:], []):
        with pytest.raises(BadReply, match="do not hold its verdict"):
            replies.verdict_probability(wrong, TEXT)
    assert replies.verdict_probability(tokens({b"1": -0.1, b"2": -9999.0}), TEXT) == 1.0


def test_the_schema_asks_for_what_the_parser_takes():
    form = replies.response_format("score", "json_schema", low=2, high=4)
    schema = form["json_schema"]["schema"]
    assert schema["required"] == list(CRITERIA) and not schema["additionalProperties"]
    part = schema["properties"]["overall"]
    assert part["properties"]["score"]["enum"] == [2, 3, 4]
    assert part["required"] == ["reason", "score"] and not part["additionalProperties"]
    form = replies.response_format("pairwise", "json_schema", low=1, high=5)
    assert form["json_schema"]["schema"]["properties"]["better"]["enum"] == [0, 1, 2]
    assert replies.response_format("score", "json_object", low=1, high=5)["type"] == "json_object"
    assert replies.response_format("score", "none", low=1, high=5) is None
