"""Row formats of preference pairs: chosen and rejected, ranked lists, scored lists."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from huatuo_jax.data.formats.dialogues import (
    Converted,
    Format,
    Terms,
    answer_turns,
    identity,
    instruction_prompt,
    is_instruction,
    is_listed,
    is_question,
    listed_prompt,
    question_prompt,
)
from huatuo_jax.data.formats.turns import (
    JsonRow,
    RowLeftOut,
    RowProblem,
    Turn,
    TurnLike,
    as_list,
    as_turns,
    check_turns,
    has,
    present,
    prompt_messages,
    structured,
)
from huatuo_jax.data.records import (
    Comparison,
    Messages,
    Ranking,
    is_empty,
    same_answer,
    shown,
    unmarked,
)

NO_PROBABILITY = "p_chosen is absent in a row that has the field: taken for 1"
SAME_TEXT = "chosen and rejected are the same"
TOO_FEW = "fewer than two answers"
ALL_TIED = "no two answers differ in text and score"
SOME_TIED = "pairs left out whose answers do not differ in text and score"
EMPTY_CHOSEN = "the chosen answer is empty, kept"
EMPTY_ANSWER = "an empty answer, kept"

_PAIR_KEYS = (
    ("chosen", "rejected"),
    ("response_chosen", "response_rejected"),
    ("chosen_response", "rejected_response"),
)
_ANSWERS_KEYS = ("answers", "responses", "outputs", "completions", "output")
_TEXT_KEYS = ("text", "content", "answer", "response")


def _pair_keys(row: object) -> tuple[str, str] | None:
    return next((pair for pair in _PAIR_KEYS if has(row, *pair)), None)


def _is_pair(row: Any) -> bool:
    keys = _pair_keys(row)
    if keys is None:
        return False
    # Without a prompt field, the pair must be two whole dialogues.
    return _has_prompt(row) or all(as_turns(row[key]) is not None for key in keys)


def _has_prompt(row: Any) -> bool:
    return is_listed(row) or is_instruction(row) or is_question(row)


def _from_pair(row: Any, terms: Terms) -> Converted:
    keys = _pair_keys(row)
    assert keys is not None
    chosen, rejected = (answer_turns(row[key], key) for key in keys)
    if _has_prompt(row):
        prompt_turns, used = _prompt_turns(row)
        chosen = _without_prompt(chosen, prompt_turns)
        rejected = _without_prompt(rejected, prompt_turns)
    else:
        prompt_turns, used = _shared_start(chosen, rejected), ()
        chosen, rejected = chosen[len(prompt_turns) :], rejected[len(prompt_turns) :]
    prompt, repairs = prompt_messages(prompt_turns, max_turn_chars=terms.max_turn_chars)
    better, worse = (
        _continuation(prompt, turns, key, terms)
        for turns, key in zip((chosen, rejected), keys, strict=True)
    )
    if same_answer(better, worse):
        raise RowLeftOut(SAME_TEXT)
    p_chosen = _number(row, "p_chosen")
    if p_chosen is not None and not 0 <= p_chosen <= 1:
        raise RowProblem(f"p_chosen is {p_chosen}, not between 0 and 1")
    empty = _empty_answers((better, worse), judged=p_chosen is not None)
    if "p_chosen" in row and p_chosen is None:
        repairs = (*repairs, NO_PROBABILITY)
    used = (*used, *keys, "p_chosen", "margin")
    row_id, source, extra = identity(row, terms, used=used, content=[prompt, better, worse])
    comparison = Comparison(
        id=row_id,
        messages=prompt,
        chosen=better,
        rejected=worse,
        source=source,
        p_chosen=1.0 if p_chosen is None else p_chosen,
        margin=_number(row, "margin"),
        extra=extra,
    )
    return Converted((comparison,), (*repairs, *empty))


def _prompt_turns(row: JsonRow) -> tuple[list[Turn], tuple[str, ...]]:
    if is_listed(row):
        return listed_prompt(row)
    if is_instruction(row):
        return instruction_prompt(row)
    return question_prompt(row)


def _without_prompt(turns: list[Turn], prompt: Sequence[Turn]) -> list[Turn]:
    """Removes the prompt that some files repeat before both answers."""
    contents = [turn.content for turn in prompt]
    starts_with_prompt = [turn.content for turn in turns[: len(prompt)]] == contents
    return turns[len(prompt) :] if starts_with_prompt else turns


def _shared_start(chosen: Sequence[Turn], rejected: Sequence[Turn]) -> list[Turn]:
    shared: list[Turn] = []
    for one, other in zip(chosen, rejected, strict=False):
        if one[:2] != other[:2]:
            break
        shared.append(one)
    if len(shared) in (len(chosen), len(rejected)):
        raise RowLeftOut(SAME_TEXT)
    return shared


def _continuation(prompt: Messages, turns: Sequence[TurnLike], name: str, terms: Terms) -> Messages:
    """Returns the checked messages after the prompt; they end with the assistant."""
    try:
        whole, _ = check_turns(
            [*prompt, *turns], max_turn_chars=terms.max_turn_chars, empty_answer=True
        )
    except RowProblem as problem:
        raise RowProblem(f"with {name}: {problem}") from None
    if len(whole) == len(prompt) or whole[-1].role != "assistant":
        raise RowProblem(f"{name} does not end with an answer")
    return unmarked(whole[len(prompt) :])


def _empty_answers(answers: Sequence[Messages], *, judged: bool) -> tuple[str, ...]:
    """Returns the repairs to count for empty answers, best first.

    Raises:
        RowProblem: the best one is empty without a probability or score from a judge, so it is a
            missing value rather than a preference.
    """
    if not any(is_empty(one[-1].content) for one in answers):
        return ()
    if not is_empty(answers[0][-1].content):
        return (EMPTY_ANSWER,)
    if not judged:
        raise RowProblem(
            "the better answer is empty; if a judge preferred it, give p_chosen or scores"
        )
    return (EMPTY_CHOSEN,)


def _number(row: JsonRow, key: str) -> float | None:
    value = row[key] if has(row, key) else None
    return None if value is None else _as_number(value, key)


def _as_number(value: object, name: str) -> float:
    number = value
    if isinstance(value, str):  # All cells of CSV are text.
        try:
            number = float(value)
        except ValueError:
            number = None
    # The bound also refuses NaN and infinity.
    if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e30:
        raise RowProblem(f"{name} is {shown(value)!r}, not a number")
    return float(number)


def _answers_key(row: Any) -> str | None:
    found = [key for key in present(row, _ANSWERS_KEYS) if as_list(row[key]) is not None]
    return found[0] if found and _has_prompt(row) else None


def _answers(row: JsonRow) -> tuple[str, list[Any]]:
    key = _answers_key(row)
    assert key is not None
    return key, as_list(row[key]) or []


def _is_scored(row: Any) -> bool:
    if _answers_key(row) is None:
        return False
    _, answers = _answers(row)
    return has(row, "scores") or (bool(answers) and all(has(one, "score") for one in answers))


def _from_scored(row: Any, terms: Terms) -> Converted:
    key, items = _answers(row)
    scores = structured(row["scores"]) if has(row, "scores") else [item["score"] for item in items]
    if not isinstance(scores, list) or len(scores) != len(items):
        raise RowProblem(f"scores and {key} are not lists of one length")
    scores = [_as_number(score, f"score {number}") for number, score in enumerate(scores, 1)]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    answers = [_text_of(items[index], key) for index in order]
    return _ranking(row, answers, [scores[index] for index in order], terms, key)


def _from_ranked(row: Any, terms: Terms) -> Converted:
    key, items = _answers(row)
    return _ranking(row, [_text_of(item, key) for item in items], None, terms, key)


def _text_of(item: object, name: str) -> object:
    if not isinstance(item, Mapping):
        return item
    found = present(item, _TEXT_KEYS)
    if not found:
        raise RowProblem(f"an item of {name} has none of {', '.join(_TEXT_KEYS)}")
    return item[found[0]]


def _ranking(
    row: JsonRow, texts: Sequence[object], scores: list[float] | None, terms: Terms, key: str
) -> Converted:
    """Returns all pairs of the answers, which are given best first."""
    prompt_turns, used = _prompt_turns(row)
    prompt, repairs = prompt_messages(prompt_turns, max_turn_chars=terms.max_turn_chars)
    answers = tuple(
        _continuation(prompt, [Turn("assistant", text)], f"{key}[{rank}]", terms)
        for rank, text in enumerate(texts)
    )
    if len(answers) < 2:
        raise RowLeftOut(TOO_FEW)
    used = (*used, key, "scores")
    row_id, source, extra = identity(row, terms, used=used, content=[prompt, answers])
    ranking = Ranking(
        id=row_id,
        messages=prompt,
        answers=answers,
        source=source,
        scores=None if scores is None else tuple(scores),
        extra=extra,
    )
    pairs = ranking.comparisons()
    if not pairs:
        raise RowLeftOut(ALL_TIED)
    if len(pairs) < math.comb(len(answers), 2):
        repairs = (*repairs, SOME_TIED)
    empty = _empty_answers(answers, judged=scores is not None)
    return Converted(pairs, (*repairs, *empty))


COMPARISON_FORMATS: tuple[Format, ...] = (
    Format(
        "chosen and rejected",
        "comparison",
        " or ".join("/".join(pair) for pair in _PAIR_KEYS) + ", and a prompt in any usual shape",
        _is_pair,
        _from_pair,
    ),
    Format(
        "scored list",
        "comparison",
        "a prompt, a list of answers, and scores (a list beside it, or score in each answer)",
        _is_scored,
        _from_scored,
    ),
    Format(
        "ranked list",
        "comparison",
        f"a prompt and a list of answers, best first, under {', '.join(_ANSWERS_KEYS)}",
        lambda row: (
            _answers_key(row) is not None
            and all(isinstance(item, str) for item in _answers(row)[1])
        ),
        _from_ranked,
    ),
)
