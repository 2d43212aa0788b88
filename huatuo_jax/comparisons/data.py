"""Comparisons as models are trained on them: prompts, answers as tokens, and pairs.

All comparisons of one prompt form a group; each of its answers stands there once, however many
pairs it is part of. Whether a group is held out is told by its prompt (or by its case, where a
field names one), so no prompt has pairs on both sides.
"""

import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from huatuo_jax.comparisons.made_comparisons import mismatched_references, spoiled_answers
from huatuo_jax.data import templates
from huatuo_jax.data.chat import TruncationPolicy
from huatuo_jax.data.examples import Dropped, TokenIds, Tokens
from huatuo_jax.data.held_out import HeldOutConfig, dialogue_text
from huatuo_jax.data.readers import read_comparisons, read_dialogues
from huatuo_jax.data.records import Comparison, Messages, unmarked
from huatuo_jax.data.sources import HeldOutBy
from huatuo_jax.data.tokenizing import TemplateTokenizer, tokenize_in_chunks
from huatuo_jax.training.run_directory import operational

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reads = Literal["comparisons", "dialogues", "dialogues_to_spoil"]
HELD_OUT_ELSEWHERE = "held out by another source"
NOT_TO_LEARN = "dialogue with an answer that is marked as not to be trained"
SAME_TOKENS = "both answers are the same tokens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonSource:
    """One source of comparisons.

    Attributes:
        name: what reports call it; None for what its rows say. Comparisons that are made here
            keep what they were made by before it.
        paths: files.
        reads: what they hold: `comparisons`, or dialogues to make some of without a judge, by
            `made_comparisons.mismatched_references` (`dialogues`) or `spoiled_answers`
            (`dialogues_to_spoil`).
        held_out_by: `hash`, `never` or `always`.
        encoding: of text files; None tells it by evidence, see `huatuo_jax.data.encodings`.
    """

    name: str | None = None
    paths: tuple[str, ...] = operational(())
    reads: Reads = "comparisons"
    held_out_by: HeldOutBy = "hash"
    encoding: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    """How a prompt and an answer become tokens.

    Attributes:
        template: the chat template's name.
        default_system: its system text; None for the template's own.
        truncation: what becomes of a prompt and answer longer than `max_length`.
        max_length: tokens of a prompt and an answer.
        num_processes: processes that tokenise.
    """

    template: str = "huatuogpt"
    default_system: str | None = None
    truncation: TruncationPolicy = "drop_oldest_turns"
    max_length: int = 1024
    num_processes: int = operational(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonsConfig(AnswersConfig):
    """The comparisons of a run and how they become rows, beside the fields of `AnswersConfig`.

    Attributes:
        sources: where they are.
        row_length: tokens of a row, at least two of those; a prompt's answers share a row.
        packed: several prompts a row, or one.
        window: how many prompts are packed together; None for the epoch.
        held_out: which prompts are held out.
        group_field: extra field that names what is held out (and resampled) as a whole, such as a
            case; None for the prompt.
    """

    sources: tuple[ComparisonSource, ...]
    row_length: int = 2048
    packed: bool = True
    window: int | None = None
    held_out: HeldOutConfig = HeldOutConfig(share=0.1)
    group_field: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where there is nothing to read, or a pair does not fit a row."""
        if not self.sources:
            raise ValueError("sources is empty: it must name at least one source")
        if self.max_length < 1 or self.row_length < 2 * self.max_length:
            raise ValueError(
                f"row_length={self.row_length} must be at least twice max_length="
                f"{self.max_length}: both answers of a pair stand in one row"
            )


class DialogueTokens(NamedTuple):
    """A dialogue up to its last trained token, the end of the doctor's last turn.

    Attributes:
        token_ids: of all turns.
        is_trained: the doctor's tokens, whatever turn they are in.
    """

    token_ids: TokenIds
    is_trained: npt.NDArray[np.bool_]


class Answer(NamedTuple):
    """A prompt and one answer to it.

    Attributes:
        token_ids: up to the last trained token, the end of the doctor's last turn.
        num_characters: of the doctor's turns in the answer.
        num_turns: doctor's turns in the whole dialogue.
        is_answer: the tokens of the doctor's turns in the answer, their ends included.
    """

    token_ids: TokenIds
    num_characters: int
    num_turns: int
    is_answer: npt.NDArray[np.bool_]


class Pair(NamedTuple):
    """Two answers of a group, by their places in it, and the label."""

    chosen: int
    rejected: int
    p_chosen: float
    margin: float | None
    source: str


@dataclasses.dataclass(frozen=True)
class Group:
    """The comparisons of one prompt.

    Attributes:
        id: of the first comparison, for messages.
        case: the same for all that is held out as a whole.
        answers: each once.
        pairs: of those.
    """

    id: str
    case: str
    answers: tuple[Answer, ...]
    pairs: tuple[Pair, ...]


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """What a run is trained and judged on, and how many comparisons were dropped, by reason."""

    train: tuple[Group, ...]
    held_out: tuple[Group, ...]
    dropped: Counter[str]

    @property
    def identity(self) -> dict[str, str]:
        """A hash of all tokens and labels on each side."""
        return {"train": _hash_of(self.train), "held_out": _hash_of(self.held_out)}


class _Told(NamedTuple):
    """A comparison, what is held out with it, and whether it is."""

    comparison: Comparison
    case: str
    held_out: bool
    always: bool


def open_comparisons(
    cfg: ComparisonsConfig,
    tokenizer: "PreTrainedTokenizerBase",
    progress: Callable[[int, int], None] | None = None,
) -> Comparisons:
    """Reads, splits and tokenises the comparisons.

    Args:
        cfg: which ones.
        tokenizer: the model's.
        progress: called with answers done and answers in all.

    Raises:
        ValueError: a file that cannot be read, an unknown template, a comparison without the
            group field, or nothing left to train on.
    """
    dropped: Counter[str] = Counter()
    told = list(_told(cfg, dropped))
    always = {one.case for one in told if one.always}
    kept = [one for one in told if one.held_out or one.case not in always]
    dropped[HELD_OUT_ELSEWHERE] += len(told) - len(kept)
    dialogues = itertools.chain.from_iterable(
        (one.comparison.chosen_dialogue, one.comparison.rejected_dialogue) for one in kept
    )
    tokens = tokenize_answers(dialogues, cfg, tokenizer, progress)
    train = _groups([one for one in kept if not one.held_out], tokens, dropped)
    held_out = _groups([one for one in kept if one.held_out], tokens, dropped)
    if not train:
        raise ValueError(
            f"data.sources: no comparison is left to train on ({len(told)} read, "
            f"{sum(one.held_out for one in told)} held out, dropped: {dict(+dropped)})"
        )
    return Comparisons(train, held_out, +dropped)


def tokenize_answers(
    dialogues: Iterable[Messages],
    cfg: AnswersConfig,
    tokenizer: "PreTrainedTokenizerBase",
    progress: Callable[[int, int], None] | None = None,
) -> dict[Messages, DialogueTokens | str]:
    """The tokens of each different dialogue up to its last trained one, or why it has none.

    Args:
        dialogues: each ends with the doctor.
        cfg: how they are said, and how long they may be.
        tokenizer: the model's.
        progress: called with dialogues done and dialogues in all.

    Raises:
        ValueError: an unknown template.
    """
    tokenize = TemplateTokenizer(
        template=templates.by_name(cfg.template, default_system=cfg.default_system),
        tokenizer=tokenizer,
        max_tokens=cfg.max_length,
        policy=cfg.truncation,
    )
    different = list(dict.fromkeys(dialogues))
    chunks = tokenize_in_chunks(
        [unmarked(messages) for messages in different],
        tokenize,
        num_processes=cfg.num_processes,
        progress=None
        if progress is None
        else lambda done: progress(done.num_done, done.num_dialogues),
    )
    return {
        messages: str(one.reason) if isinstance(one, Dropped) else _up_to_last_trained(one)
        for messages, one in zip(different, itertools.chain.from_iterable(chunks), strict=True)
    }


def make_answer(tokens: DialogueTokens, prompt: Messages, continuation: Messages) -> Answer:
    """An answer with what reports tell of it."""
    spoken = [message for message in continuation if message.role == "assistant"]
    characters = sum(len(message.content) for message in spoken)
    before_T = np.append(False, tokens.is_trained[:-1])
    starts = np.flatnonzero(tokens.is_trained & ~before_T)  # Of the doctor's turns.
    # Of a dialogue that was cut, fewer may be left than the answer has.
    first = starts[-min(len(spoken), len(starts))]
    is_answer_T = tokens.is_trained & (np.arange(len(before_T)) >= first)
    return Answer(tokens.token_ids, characters, len(spoken) + _num_turns(prompt), is_answer_T)


def _told(cfg: ComparisonsConfig, dropped: Counter[str]) -> Iterator[_Told]:
    for source in cfg.sources:
        for path in source.paths:
            for comparison in _read(source, path, dropped):
                case = _case(comparison, cfg.group_field)
                held_out = source.held_out_by == "always" or (
                    source.held_out_by == "hash" and cfg.held_out.holds_out(case)
                )
                yield _Told(comparison, case, held_out, source.held_out_by == "always")


def _read(source: ComparisonSource, path: str, dropped: Counter[str]) -> Sequence[Comparison]:
    if source.reads == "comparisons":
        return list(read_comparisons(path, source=source.name, encoding=source.encoding))
    make = mismatched_references if source.reads == "dialogues" else spoiled_answers
    dialogues = list(read_dialogues(path, encoding=source.encoding))
    # What is not to be learned is not to be chosen either.
    good = [one for one in dialogues if one.messages == unmarked(one.messages)]
    dropped[NOT_TO_LEARN] += len(dialogues) - len(good)
    made = make(good)
    if source.name is None:
        return made
    return [dataclasses.replace(one, source=f"{one.source}:{source.name}") for one in made]


def _case(comparison: Comparison, field: str | None) -> str:
    if field is None:
        return dialogue_text(comparison.messages)
    if field not in comparison.extra:
        raise ValueError(
            f"data.group_field={field!r}: comparison {comparison.id!r} has no such field; it has "
            f"{sorted(comparison.extra)}"
        )
    return str(comparison.extra[field])


def _groups(
    told: Sequence[_Told], tokens: dict[Messages, DialogueTokens | str], dropped: Counter[str]
) -> tuple[Group, ...]:
    """The groups in the order of their first comparisons; what cannot be used is counted."""
    by_prompt: dict[tuple[str, str], list[Comparison]] = {}
    for one in told:
        by_prompt.setdefault((one.case, one.comparison.group), []).append(one.comparison)
    groups = []
    for (case, _), comparisons in by_prompt.items():
        answers: dict[bytes, tuple[int, Answer]] = {}
        pairs = []
        for comparison in comparisons:
            both = _both_answers(comparison, tokens)
            if isinstance(both, str):
                dropped[both] += 1
                continue
            # By their tokens: the model cannot tell answers of the same ones apart.
            chosen, rejected = (
                answers.setdefault(answer.token_ids.tobytes(), (len(answers), answer))[0]
                for answer in both
            )
            pairs.append(
                Pair(chosen, rejected, comparison.p_chosen, comparison.margin, comparison.source)
            )
        if pairs:
            group = tuple(answer for _, answer in answers.values())
            groups.append(Group(comparisons[0].id, case, group, tuple(pairs)))
    return tuple(groups)


def _both_answers(
    comparison: Comparison, tokens: dict[Messages, DialogueTokens | str]
) -> tuple[Answer, Answer] | str:
    """Chosen and rejected as tokens, or why the comparison cannot be used."""
    answers = []
    for continuation in (comparison.chosen, comparison.rejected):
        found = tokens[comparison.messages + continuation]
        if isinstance(found, str):
            return found
        answers.append(make_answer(found, comparison.messages, continuation))
    chosen, rejected = answers
    if np.array_equal(chosen.token_ids, rejected.token_ids):
        return SAME_TOKENS
    return chosen, rejected


def _up_to_last_trained(example: Tokens) -> DialogueTokens:
    end = np.flatnonzero(example.trained_mask)[-1] + 1
    return DialogueTokens(example.token_ids[:end], example.trained_mask[:end])


def _num_turns(messages: Messages) -> int:
    return sum(message.role == "assistant" for message in messages)


def _hash_of(groups: Sequence[Group]) -> str:
    whole = hashlib.sha256()
    for group in groups:
        whole.update(repr((group.case, group.pairs, len(group.answers))).encode())
        for answer in group.answers:
            whole.update(answer.token_ids.tobytes() + b"\0")
    return whole.hexdigest()[:32]
