"""Records of data files: dialogues, prompts, preference pairs, cases and exam questions.

Every record is frozen, writes itself to the JSON of the files between stages (`to_json`) and reads
itself from it (`from_json`). Unknown fields are kept in `extra`.
"""

import hashlib
import itertools
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Self, get_args

Role = Literal["system", "user", "assistant"]
Kind = Literal[
    "distilled_instruction", "real_instruction", "distilled_conversation", "real_conversation"
]
ROLES: tuple[Role, ...] = get_args(Role)
KINDS: tuple[Kind, ...] = get_args(Kind)

Json = dict[str, Any]

# Invisible letters and symbols: the fillers of Hangul, the empty Braille cell.
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"


class Message(NamedTuple):
    """One turn of a dialogue: the role, and the text of the file.

    `trained` is False for an assistant turn that its source marks as not to be trained.
    """

    role: Role
    content: str
    trained: bool = True


Messages = tuple[Message, ...]


def unmarked(messages: Sequence[Message]) -> Messages:
    """Returns the messages without their trained marks, for prompts and comparisons."""
    return tuple(message._replace(trained=True) for message in messages)


def shown(text: object, limit: int = 40) -> str:
    """Returns a text for a message: shortened, with line breaks and controls escaped."""
    whole = str(text)
    cut = whole if len(whole) <= limit else f"{whole[: limit - 3]}..."
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in cut
    )


def content_id(source: str, content: object) -> str:
    """Returns a short id that depends on the source's name and the content only.

    For rows without an id of their own: it stays the same when rows are added or reordered.
    """
    plain = [source, _without_defaults(content)]
    text = json.dumps(plain, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _without_defaults(content: object) -> object:
    """Returns messages as pairs of role and content, with a mark only if there is one."""
    if isinstance(content, Message):
        return list(content if not content.trained else content[:2])
    if isinstance(content, list | tuple):
        return [_without_defaults(item) for item in content]
    return content


def messages_to_json(messages: Sequence[Message]) -> list[Json]:
    """Returns the messages as `{"role", "content"}`, with `"weight": 0` where not trained."""
    return [
        {"role": message.role, "content": message.content}
        | ({} if message.trained else {"weight": 0})
        for message in messages
    ]


def messages_from_json(value: object, *, name: str = "messages") -> Messages:
    """Returns the messages of a list of `{"role", "content", "weight"?}`.

    Raises:
        ValueError: an item has another role, a content that is not text, or a weight that is
            neither 0 nor 1.
    """
    if not isinstance(value, list):
        raise ValueError(f"{name} is a {type(value).__name__}, not a list of role and content")
    messages = []
    for index, item in enumerate(value):
        role, content = _field(item, "role", name), _field(item, "content", name)
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"{name}[{index}] has role {role!r} and a {type(content).__name__} as content;"
                f" it needs one of {', '.join(ROLES)} and text"
            )
        if (weight := item.get("weight")) not in (None, 0, 1):
            raise ValueError(f"{name}[{index}].weight is {weight!r}; it should be 0 or 1")
        messages.append(Message(role, content, weight != 0))
    return tuple(messages)


def answer(text: str) -> Messages:
    """Returns a continuation of one assistant message, the usual `chosen` or `rejected`."""
    return (Message("assistant", text),)


def is_empty(text: str) -> bool:
    """Returns whether a response is empty: it has no visible character.

    White space, controls, format characters (zero-width ones, byte order marks) and fillers are
    invisible, and so are combining marks without a letter.

    A policy samples such answers by ending its turn at once. Every stage keeps, judges and scores
    them like any other answer. Only training on dialogues refuses them.
    """
    return all(_is_invisible(character) for character in text)


def _is_invisible(character: str) -> bool:
    category = unicodedata.category(character)
    return (category[0] in "ZMC" and category not in ("Co", "Cn")) or character in _FILLERS


def same_answer(one: Messages, other: Messages) -> bool:
    """Returns whether two continuations are the same messages, or both empty."""
    return one == other or all(
        len(messages) == 1 and is_empty(messages[0].content) for messages in (one, other)
    )


@dataclass(frozen=True)
class _Stored:
    """A record that writes itself to a JSON object and reads itself from it."""

    def to_json(self) -> Json:
        """Returns the extra fields and the record's own; those that are None are left out."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        required, optional = _stored_fields(type(self))
        row = {name: _written(name, values[name]) for name in required}
        return {**values["extra"], **row, **_present(**{name: values[name] for name in optional})}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Returns the record that `to_json` wrote; unknown fields become `extra`.

        Raises:
            ValueError: a field is missing or has a wrong value.
        """
        required, optional = _stored_fields(cls)
        values = {name: _read(name, _field(row, name)) for name in required}
        values |= {name: row.get(name) for name in optional}
        make: Callable[..., Self] = cls
        return make(**values, extra=_others(row, *required, *optional))


def _stored_fields(kind: type[_Stored]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns a record's fields in the order of JSON: all but those that may be None, and these."""
    kept = [one for one in fields(kind) if one.name != "extra"]
    optional = tuple(one.name for one in kept if type(None) in get_args(one.type))
    required = [one.name for one in kept if one.name not in (*optional, "source")]
    return (*required, "source"), optional


def _written(name: str, value: Any) -> Any:
    if name == "messages":
        return messages_to_json(value)
    if name in ("chosen", "rejected"):
        return _continuation_to_json(value)
    return dict(value) if name == "options" else value


def _read(name: str, value: Any) -> Any:
    if name == "messages":
        return messages_from_json(value)
    if name in ("chosen", "rejected"):
        return answer(value) if isinstance(value, str) else messages_from_json(value, name=name)
    return float(value) if name == "p_chosen" else value


@dataclass(frozen=True)
class Dialogue(_Stored):
    """A conversation to train on: it ends with an assistant message.

    In JSON: `{"id", "messages", "source", "kind"?}` and the extra fields.
    """

    id: str
    messages: Messages
    kind: Kind | None
    source: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validates the kind."""
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it should be one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class Prompt(_Stored):
    """Messages for a model to answer; they end with a user message.

    `reference` is a real doctor's answer, `diagnosis` a real doctor's finding; judges use both.
    In JSON: `{"id", "messages", "source", "reference"?, "diagnosis"?}` and the extra fields.
    """

    id: str
    messages: Messages
    source: str
    reference: str | None = None
    diagnosis: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_dialogue(cls, dialogue: Dialogue) -> "Prompt":
        """Returns the dialogue without its last answer, the reference if it may be learned.

        Raises:
            ValueError: the dialogue's `diagnosis` is not text.
        """
        last = dialogue.messages[-1]
        diagnosis = dialogue.extra["diagnosis"] if "diagnosis" in dialogue.extra else None
        if not isinstance(diagnosis, str | None):
            raise ValueError(
                f"dialogue {dialogue.id!r}: diagnosis is {type(diagnosis).__name__}; it should be"
                " text"
            )
        return cls(
            id=dialogue.id,
            messages=unmarked(dialogue.messages[:-1]),
            source=dialogue.source,
            reference=last.content if last.trained else None,
            diagnosis=diagnosis if diagnosis and diagnosis.strip() else None,
            extra={
                **_others(dialogue.extra, "diagnosis", "reference"),
                **_present(kind=dialogue.kind, original_reference=dialogue.extra.get("reference")),
            },
        )


@dataclass(frozen=True)
class Comparison(_Stored):
    """A preference pair: two continuations of one prompt, and P(first is better).

    `chosen` and `rejected` are messages, not strings: mostly one assistant message each, but of
    compared consultations all that follows the prompt. In JSON the usual single answer is a plain
    string. The last message of either may be empty (see `is_empty`). `margin` is the score of the
    chosen answer minus that of the rejected one, in the unit of those scores; it is 0 or negative
    for a tie or a choice against the scores.

    In JSON: `{"id", "messages", "chosen", "rejected", "p_chosen", "source", "margin"?}`, extras.
    """

    id: str
    messages: Messages
    chosen: Messages
    rejected: Messages
    source: str
    p_chosen: float = 1.0
    margin: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validates the probability."""
        if not 0.0 <= self.p_chosen <= 1.0:
            raise ValueError(f"p_chosen is {self.p_chosen}; it should lie between 0 and 1")

    @property
    def group(self) -> str:
        """The group id shared by all pairs of one prompt, which belong in one reward batch."""
        return content_id("", self.messages)

    @property
    def chosen_dialogue(self) -> Messages:
        """The prompt and the better continuation, to be scored as one dialogue."""
        return self.messages + self.chosen

    @property
    def rejected_dialogue(self) -> Messages:
        """The prompt and the worse continuation, to be scored as one dialogue."""
        return self.messages + self.rejected


@dataclass(frozen=True)
class Ranking:
    """Several continuations of one prompt, best first, with their scores where there are any."""

    id: str
    messages: Messages
    answers: tuple[Messages, ...]
    source: str
    scores: tuple[float, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses scores that rise with the rank, or are not one an answer."""
        if self.scores is None:
            return
        if len(self.scores) != len(self.answers):
            raise ValueError(f"{len(self.scores)} scores for {len(self.answers)} answers")
        if any(better < worse for better, worse in itertools.pairwise(self.scores)):
            raise ValueError(f"scores {self.scores} rise; the best answer should come first")

    def comparisons(self) -> tuple[Comparison, ...]:
        """Returns every pair of answers that differ in text and (if scored) score, best first."""
        pairs = []
        for better, worse in itertools.combinations(range(len(self.answers)), 2):
            margin = None if self.scores is None else self.scores[better] - self.scores[worse]
            if margin == 0 or same_answer(self.answers[better], self.answers[worse]):
                continue
            pairs.append(
                Comparison(
                    id=f"{self.id}:{better}-{worse}",
                    messages=self.messages,
                    chosen=self.answers[better],
                    rejected=self.answers[worse],
                    source=self.source,
                    margin=margin,
                    extra=self.extra,
                )
            )
        return tuple(pairs)


@dataclass(frozen=True)
class Case(_Stored):
    """A medical case as described by a patient, and the doctor's diagnosis.

    In JSON: `{"id", "medical_case", "doctor_diagnosis", "source", "department"?}` and extras.
    """

    id: str
    medical_case: str
    doctor_diagnosis: str
    department: str | None
    source: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExamQuestion(_Stored):
    """A multiple-choice question; `answer` holds the letters of all right options, in order.

    In JSON: `{"id", "question", "options", "answer", "source", "explanation"?}` and extras.
    """

    id: str
    question: str
    options: Mapping[str, str]
    answer: str
    source: str
    explanation: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses an answer that names no option or an unknown one."""
        if not self.answer or not set(self.answer) <= set(self.options):
            letters = "".join(self.options)
            raise ValueError(f"answer is {self.answer!r}; it should be letters out of {letters!r}")


Record = Dialogue | Prompt | Comparison | Case | ExamQuestion


def _continuation_to_json(messages: Messages) -> str | list[Json]:
    if len(messages) == 1 and messages[0].role == "assistant":
        return messages[0].content
    return messages_to_json(messages)


def _field(row: object, name: str, where: str = "the record") -> Any:
    if not isinstance(row, Mapping) or name not in row:
        keys = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{where} lacks {name!r}; it has {shown(keys, 200)}")
    return row[name]


def _present(**fields: object) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def _others(row: Mapping[str, Any], *names: str) -> Json:
    return {name: value for name, value in row.items() if name not in names}
