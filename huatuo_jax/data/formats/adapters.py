"""Named adapters: each rewrites the rows of one published data set into rows of a common format.

An adapter rewrites rows only; the rewritten rows are checked like all others.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from huatuo_jax.data.files import Row, RowError
from huatuo_jax.data.formats.dialogues import describe
from huatuo_jax.data.formats.turns import RowProblem, has, is_huatuo_list, listed_turns, present

LAST_TURNS_ONLY = "turn that a later line of its dialogue repeats"


class LeftOut(NamedTuple):
    """A valid row that gives no record of its own, and the reason to count."""

    line: int
    reason: str


Rows = Iterable[Row | RowError]
Rewritten = Iterator[Row | RowError | LeftOut]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A name, a line about it, and the function that rewrites a stream of rows."""

    name: str
    about: str
    rewrite: Callable[[Rows], Rewritten]


def row_adapter(name: str, about: str, rewrite_row: Callable[[Any], Any]) -> Adapter:
    """Makes an adapter that rewrites each row by itself; `rewrite_row` may raise `RowProblem`."""
    return Adapter(name, about, functools.partial(_rewrite_each, rewrite_row=rewrite_row))


def find_adapter(name: str) -> Adapter:
    """Returns the adapter of that name.

    Raises:
        ValueError: there is none; the text lists them.
    """
    for adapter in ADAPTERS:
        if adapter.name == name:
            return adapter
    known = "; ".join(f"{adapter.name} ({adapter.about})" for adapter in ADAPTERS)
    raise ValueError(f"adapter is {name!r}; it should be one of: {known}")


def _rewrite_each(rows: Rows, *, rewrite_row: Callable[[Any], Any]) -> Rewritten:
    for row in rows:
        if isinstance(row, RowError):
            yield row
            continue
        try:
            yield row._replace(value=rewrite_row(row.value))
        except RowProblem as problem:
            yield RowError(row.file, row.line, str(problem))


def _need(row: Any, *keys: str) -> None:
    if not has(row, *keys):
        raise RowProblem(f"{describe(row)}; this adapter needs {', '.join(keys)}")


def _need_text(row: Any, *keys: str) -> None:
    _need(row, *keys)
    for key in keys:
        if not isinstance(row[key], str):
            raise RowProblem(f"{key} is {type(row[key]).__name__}, not text")


def _need_list(row: Any, key: str) -> None:
    _need(row, key)
    if not isinstance(row[key], list):
        raise RowProblem(f"{key} is {type(row[key]).__name__}, not a list")


def _without(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


def _toyhom(row: Any) -> Any:
    """Joins a question's title and text; `无` (none) stands for a missing text."""
    if not isinstance(row, dict) or not {"title", "ask"} <= row.keys():
        _need(row, "title", "ask")
    _need_text(row, *present(row, ("title", "ask")) or ("title",))  # One cell may be blank.
    title, ask = (row[key].strip() if has(row, key) else "" for key in ("title", "ask"))
    parts = [part for part in (title, ask) if part not in ("", "无")]
    question = ask if title and ask.startswith(title) else "\n".join(parts)
    return {**_without(row, "title", "ask"), "question": question}


_FLAT_TURN = re.compile(r"<(user|bot)>:")


def _bentsao(row: Any) -> Any:
    """Splits `instruction`, `<user>: ... <bot>: ...`; the last answer is in `output`."""
    _need_text(row, "instruction")
    _need(row, "output")
    before, *pieces = _FLAT_TURN.split(row["instruction"])
    if before.strip() or not pieces:
        raise RowProblem("instruction does not begin with <user>:")
    turns = [
        {"role": role, "content": text.strip()}
        for role, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    turns.append({"role": "assistant", "content": row["output"]})
    extra = _without(row, "instruction", "output", *(() if row.get("input") else ("input",)))
    return {**extra, "messages": turns}


def _apollo(row: Any) -> Any:
    """Reads a dialogue that is a bare list: question, answer, question, answer."""
    if not isinstance(row, list):
        raise RowProblem(f"{describe(row)}; this adapter needs a list of question and answer")
    if is_huatuo_list(row):
        raise RowProblem("a list of 问：... and 答：... is a common format, which needs no adapter")
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(row)]}


def _apollo_exam(row: Any) -> Any:
    """Corrects the misspelt key of the answer, and options that end in a stray quote and stop."""
    _need_text(row, "option", "anwer")
    option = re.sub(r'\n"\.\s*$', "", row["option"])
    return {**_without(row, "anwer"), "option": option, "answer": row["anwer"]}


def _huatuo26m(row: Any) -> Any:
    """Reads rows whose question and answer are lists of one."""
    _need(row, "instruction", "output")
    return {**row, "instruction": _single(row["instruction"]), "output": _single(row["output"])}


def _single(value: Any) -> Any:
    if not isinstance(value, list) or len(value) != 1:
        raise RowProblem("instruction and output should be lists of one text each")
    return value[0]


def _huatuo_o1(row: Any) -> Any:
    """Puts the chain of thought before the answer, as HuatuoGPT-o1 is trained (2412.18925)."""
    _need_text(row, "Question", "Complex_CoT", "Response")
    thought = f"## Thinking\n\n{row['Complex_CoT']}\n\n## Final Response\n\n{row['Response']}"
    return {**_without(row, "Complex_CoT"), "Response": thought}


def _cmb_clin(row: Any) -> Any:
    """Makes one dialogue, which opens with the case, of a case and its questions."""
    _need_text(row, "description")
    _need_list(row, "QA_pairs")
    turns = []
    for number, pair in enumerate(row["QA_pairs"]):
        _need(pair, "question", "answer")
        opening = f"{row['description']}\n\n" if number == 0 else ""
        turns.append({"role": "user", "content": f"{opening}{pair['question']}"})
        turns.append({"role": "assistant", "content": pair["answer"]})
    return {**_without(row, "description", "QA_pairs"), "messages": turns}


_PUBMEDQA_OPTIONS = {"A": "yes", "B": "no", "C": "maybe"}


def _pubmedqa(row: Any) -> Any:
    """Makes an exam question with yes, no or maybe, the abstract before the question."""
    _need_text(row, "QUESTION", "final_decision")
    _need_list(row, "CONTEXTS")
    if not all(isinstance(text, str) for text in row["CONTEXTS"]):
        raise RowProblem("CONTEXTS holds something that is not text")
    letters = [key for key, text in _PUBMEDQA_OPTIONS.items() if text == row["final_decision"]]
    if not letters:
        raise RowProblem(f"final_decision is {row['final_decision']!r}, not yes, no or maybe")
    question = "\n".join([*row["CONTEXTS"], row["QUESTION"]])
    kept = _without(row, "QUESTION", "CONTEXTS", "final_decision")
    return {**kept, "question": question, "options": _PUBMEDQA_OPTIONS, "answer": letters[0]}


_SCORED_TALK = re.compile(r"\[start of conversation\]\n(.*)\n\[end of conversation\]", re.DOTALL)
_SCORED_TURN = re.compile(r"^(patient|doctor): ", re.MULTILINE)
_SCORE = re.compile(r"^([A-Za-z ]+): *(\d+(?:\.\d+)?) *$", re.MULTILINE)


def disc_scores_of(row: Any) -> dict[str, float]:
    """Reads the judge's scores by criterion from lines such as `Accuracy: 4`.

    Raises:
        RowProblem: there are none, or one is not between 1 and 5.
    """
    _need(row, "scores")
    scores = {name: float(score) for name, score in _SCORE.findall(str(row["scores"]))}
    if not scores or any(not 1 <= score <= 5 for score in scores.values()):
        raise RowProblem(f"scores are not lines of name and 1 to 5: {str(row['scores'])[:60]!r}")
    return scores


def _disc_scores(row: Any) -> Any:
    """Takes the judged dialogue out of the judge's prompt, with its scores."""
    _need_text(row, "prompt", "scores")
    talk = _SCORED_TALK.search(row["prompt"])
    pieces = _SCORED_TURN.split(talk.group(1).strip()) if talk else [""]
    turns = [
        {"role": role, "content": text.removesuffix("\n")}
        for role, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    listed_turns(turns, "the conversation in prompt")
    return {**_without(row, "prompt"), "scores": disc_scores_of(row), "conversation": turns}


_TAGGED = re.compile(r"<\|(\w+)\|>(.*?)<\|endof\1\|>", re.DOTALL)
_TAGGED_TURN = re.compile(r"<\|(user|system)\|>")
_NOTES = ("intent", "knowledge", "action")


def _remedi(rows: Rows) -> Rewritten:
    """Keeps the fullest line of each dialogue: one doctor turn a line, with all turns before it."""
    held: Row | None = None
    for row in rows:
        if isinstance(row, RowError):
            yield row
            continue
        try:
            turns, notes = _remedi_line(row.value)
        except RowProblem as problem:
            yield RowError(row.file, row.line, str(problem))
            continue
        if held is not None and turns[:-2] == held.value["conversation"]:
            yield LeftOut(held.line, LAST_TURNS_ONLY)
            notes = [*held.value["annotations"], *notes]
        elif held is not None:
            yield held
        held = row._replace(value={"conversation": turns, "annotations": notes})
    if held is not None:
        yield held


def _remedi_line(text: Any) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns the turns of a tagged line, and its notes about the last one."""
    fields = {tag: part.strip() for tag, part in _TAGGED.findall(str(text))}
    missing = [tag for tag in ("context", "currentuser", "response") if tag not in fields]
    if missing:
        raise RowProblem(f"the line lacks <|{'|>, <|'.join(missing)}|> with its end (cut off?)")
    _, *pieces = _TAGGED_TURN.split(fields["context"])
    spoken = [*pieces, "user", fields["currentuser"], "system", fields["response"]]
    roles = {"user": "user", "system": "assistant"}
    turns = [
        {"role": roles[name], "content": text.strip()}
        for name, text in zip(spoken[::2], spoken[1::2], strict=True)
    ]
    return turns, [{tag: fields[tag] for tag in _NOTES if tag in fields}]


ADAPTERS: tuple[Adapter, ...] = (
    row_adapter("toyhom", "Chinese-medical-dialogue-data: title, ask, answer", _toyhom),
    row_adapter("bentsao", "literature dialogues flattened as <user>: and <bot>:", _bentsao),
    row_adapter("apollo", "ApolloCorpus: bare lists of question and answer", _apollo),
    row_adapter("apollo_exam", "ApolloCorpus exams: option, anwer", _apollo_exam),
    row_adapter("disc_scores", "DISC-MedLLM: dialogues inside the judge's prompts", _disc_scores),
    row_adapter("huatuo26m", "Huatuo-26M test set: lists of one", _huatuo26m),
    row_adapter("huatuo_o1", "medical-o1: Complex_CoT trained before Response", _huatuo_o1),
    row_adapter("cmb_clin", "CMB-Clin: a case and questions about it", _cmb_clin),
    row_adapter("pubmedqa", "PubMedQA: yes, no or maybe", _pubmedqa),
    Adapter("remedi", "ReMeDi: tagged text, one turn a line", _remedi),
)
