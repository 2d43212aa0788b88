import json
import math

import pytest

from huatuo_jax.feedback import replies
from huatuo_jax.feedback.judgements import CRITERIA
from huatuo_jax.feedback.replies import BadReply, Token

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
    p_first = replies.verdict_probability(tokens_of(pieces, alternatives))
    assert p_first == pytest.approx(expected, abs=1e-12)


def test_a_place_where_the_verdicts_have_little_probability_is_refused():
    tokens = tokens_of(['{"reason":"x","better":', "1"], {"1": 0.2, "2": 0.2, "x": 0.6})
    with pytest.raises(BadReply, match="0.400 of the probability"):
        replies.verdict_probability(tokens)
    with pytest.raises(BadReply, match="hold no verdict"):
        replies.verdict_probability(tokens[:1])
    nan = [tokens[0], Token(b"1", {b"1": math.nan, b"2": -1.0})]
    with pytest.raises(BadReply, match="nan of the probability"):
        replies.verdict_probability(nan)


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
