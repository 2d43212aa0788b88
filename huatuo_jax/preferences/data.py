"""Preference pairs for training: read, split by prompt, and tokenised as groups of answers.

All preference pairs of one prompt form a group, which holds each answer once, however many pairs
it belongs to. A group is held out by its prompt (or by its case, where a field names one), so no
prompt has pairs on both sides.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from huatuo_jax.core.config import operational
from huatuo_jax.data.accounting import HELD_OUT, NOT_RENDERED, TOO_LONG, TRAINED_ON, Account, placed
from huatuo_jax.data.answers import (
    AnswerToTokenize,
    Sampled,
    SampledPrompt,
    sampled_for,
    says,
    without_oldest,
)
from huatuo_jax.data.chat import templates
from huatuo_jax.data.chat.template import ChatTemplate, TruncationPolicy
from huatuo_jax.data.mixture import HeldOutConfig, dialogue_text
from huatuo_jax.data.readers import HeldOutBy, read_comparisons, read_dialogues
from huatuo_jax.data.records import Comparison, Messages, unmarked
from huatuo_jax.data.tokenizing import TokenIds, tokenize_in_chunks
from huatuo_jax.preferences.synthetic import mismatched_references, spoiled_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Reads = Literal["comparisons", "dialogues", "dialogues_to_spoil"]
HELD_OUT_ELSEWHERE = "held out by another source"
NOT_TO_LEARN = "dialogue with an answer that is marked as not to be trained"
SAME_TOKENS = "both answers are the same tokens"
AnswerKey = tuple[Messages, SampledPrompt | None, AnswerToTokenize]
"""An answer behind its prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonSource:
    """One source of preference pairs.

    Attributes:
        name: its name in reports; None for the source of each row. Pairs that are made here have
            the method's name before it.
        paths: files.
        reads: the content: `comparisons`, or dialogues to make pairs of without a judge, by
            `synthetic.mismatched_references` (`dialogues`) or `synthetic.spoiled_answers`
            (`dialogues_to_spoil`).
        held_out_by: `hash`, `never` or `always`.
        encoding: of text files; None detects it, see `huatuo_jax.data.files`.
    """

    name: str | None = None
    paths: tuple[str, ...] = operational(())
    reads: Reads = "comparisons"
    held_out_by: HeldOutBy = "hash"
    encoding: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    """The tokenisation of prompts and answers.

    Attributes:
        template: the chat template's name.
        default_system: its system text; None for the template's own.
        template_date: the date that a tokenizer's own template prints, see `templates.by_name`.
        truncation: how a prompt and answer longer than `max_length` are handled: the prompt loses
            its oldest exchanges, the same ones for all its answers, or the answer is dropped. An
            answer that does not fit after the shortest prompt is dropped either way.
        max_length: tokens of a prompt and an answer.
        num_processes: processes that tokenise.
        max_left_out_share: largest share of the rows that may be left out, because they are too
            long or the template cannot render them.
    """

    template: str = "huatuogpt"
    default_system: str | None = None
    template_date: str | None = None
    truncation: TruncationPolicy = "drop_oldest_turns"
    max_length: int = 1024
    num_processes: int = operational(1)
    max_left_out_share: float = operational(0.1)

    @property
    def chat_template(self) -> ChatTemplate:
        """Returns the template with its settings."""
        return templates.by_name(
            self.template, default_system=self.default_system, date=self.template_date
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonsConfig(AnswersConfig):
    """The preference pairs of a run and how they become rows; extends `AnswersConfig`.

    Attributes:
        sources: files of preference pairs.
        row_length: tokens of a row, at least twice `max_length`; a prompt's answers share a row.
        packed: put several prompts in a row rather than one.
        window: number of prompts that are packed together; None for the epoch.
        held_out: share and seed of the prompts that are held out.
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
        """Validates that there are sources and that a pair fits a row."""
        if not self.sources:
            raise ValueError("sources is empty: it must name at least one source")
        if self.max_length < 1 or self.row_length < 2 * self.max_length:
            raise ValueError(
                f"row_length={self.row_length} must be at least twice max_length="
                f"{self.max_length}: one row holds both answers of a pair"
            )


class AnswersToPrompt(NamedTuple):
    """A prompt and its answers to tokenise, all after the same prompt.

    Attributes:
        prompt: it ends with the user.
        answers: each once.
        sampled_prompt: the prompt that the model was given, where the answers were sampled.
    """

    prompt: Messages
    answers: tuple[AnswerToTokenize, ...]
    sampled_prompt: SampledPrompt | None = None


class AnswerTokens(NamedTuple):
    """A prompt and an answer as tokens.

    Attributes:
        token_ids: up to the last trained token, the end of the assistant's last turn, or the last
            sampled one.
        is_answer: marks the tokens that a model samples, the ends of the assistant's turns
            included; what a template writes before an answer belongs to the prompt.
        as_sampled: the ids are those that a model sampled, not the text tokenised again.
    """

    token_ids: TokenIds
    is_answer: npt.NDArray[np.bool_]
    as_sampled: bool


class Answer(NamedTuple):
    """A prompt and one answer to it.

    Attributes:
        token_ids: up to the last trained token, the end of the assistant's last turn.
        num_characters: of the assistant's turns in the answer.
        num_turns: assistant's turns in the whole dialogue.
        is_answer: marks the tokens of the assistant's turns in the answer, their ends included.
        as_sampled: the tokens are those that a model sampled.
    """

    token_ids: TokenIds
    num_characters: int
    num_turns: int
    is_answer: npt.NDArray[np.bool_]
    as_sampled: bool = False


class Pair(NamedTuple):
    """Two answers of a group, by their indices, and the label."""

    chosen: int
    rejected: int
    p_chosen: float
    margin: float | None
    source: str


@dataclasses.dataclass(frozen=True)
class Group:
    """The preference pairs of one prompt.

    Attributes:
        id: of the first pair, for messages.
        case: equal for all groups that are held out as a whole.
        answers: each once.
        pairs: pairs of those answers.
    """

    id: str
    case: str
    answers: tuple[Answer, ...]
    pairs: tuple[Pair, ...]


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """The preference pairs of a run.

    Attributes:
        train: groups to train on.
        held_out: groups to evaluate on.
        account: the use of every row.
    """

    train: tuple[Group, ...]
    held_out: tuple[Group, ...]
    account: Account

    @property
    def dropped(self) -> Counter[str]:
        """Counts the dropped preference pairs by reason."""
        return self.account.set_aside + self.account.left_out

    @property
    def identity(self) -> dict[str, str]:
        """Returns a hash of all tokens and labels on each side."""
        return {"train": groups_hash(self.train), "held_out": groups_hash(self.held_out)}


class Told(NamedTuple):
    """A preference pair, its place, its case, and whether it is held out (always, or by hash)."""

    comparison: Comparison
    place: str
    case: str
    held_out: bool
    always: bool


def open_comparisons(
    cfg: ComparisonsConfig,
    tokenizer: "PreTrainedTokenizerBase",
    progress: Callable[[int, int], None] | None = None,
) -> Comparisons:
    """Reads, splits and tokenises the preference pairs.

    Args:
        cfg: their sources, template and lengths.
        tokenizer: the model's.
        progress: called with the number of answers done and of all answers.

    Raises:
        ValueError: an unreadable file, an unknown template, a pair without the group field, too
            many that do not fit, or nothing left to train on.
    """
    account = Account("comparisons")
    read = list(_told(cfg, account))
    always = {one.case for one in read if one.always}
    kept = [one for one in read if one.held_out or one.case not in always]
    account.put_aside(HELD_OUT_ELSEWHERE, len(read) - len(kept))
    tokens = tokenize_answers(
        (answers_of(one.comparison) for one in kept), cfg, tokenizer, progress
    )
    train = groups_of([one for one in kept if not one.held_out], tokens, account, TRAINED_ON)
    held_out = groups_of([one for one in kept if one.held_out], tokens, account, HELD_OUT)
    comparisons = Comparisons(train, held_out, account)
    if not train:
        raise ValueError(
            f"data.sources: no comparison is left to train on ({len(read)} read, "
            f"{sum(one.held_out for one in read)} held out, dropped: {dict(comparisons.dropped)})"
        )
    account.check(
        cfg.max_left_out_share,
        name="data.max_left_out_share",
        limit=f"data.max_length={cfg.max_length}",
    )
    return comparisons


def tokenize_answers(
    answers: Iterable[AnswersToPrompt],
    cfg: AnswersConfig,
    tokenizer: "PreTrainedTokenizerBase",
    progress: Callable[[int, int], None] | None = None,
) -> dict[AnswerKey, AnswerTokens | str]:
    """Tokenises each different answer after its prompt, or says why it cannot.

    `huatuo_jax.data.answers` defines the rule. All given answers to one prompt are tokenised after
    the same prompt, however it is cut.

    Args:
        answers: answers to one prompt may come in several pieces.
        cfg: template and lengths.
        tokenizer: the model's.
        progress: called with the number of prompts done and of all prompts.

    Raises:
        ValueError: an unknown template.
    """
    tokenize = AnswersTokenizer(
        template=cfg.chat_template,
        tokenizer=tokenizer,
        max_tokens=cfg.max_length,
        policy=cfg.truncation,
    )
    by_prompt: dict[tuple[Messages, SampledPrompt | None], dict[AnswerToTokenize, None]] = {}
    for one in answers:
        those = by_prompt.setdefault((one.prompt, one.sampled_prompt), {})
        those.update(dict.fromkeys(one.answers))
    different = [
        AnswersToPrompt(prompt, tuple(those), sampled_prompt)
        for (prompt, sampled_prompt), those in by_prompt.items()
    ]
    chunks = tokenize_in_chunks(
        different,
        tokenize,
        num_processes=cfg.num_processes,
        progress=None
        if progress is None
        else lambda done: progress(done.num_done, done.num_dialogues),
    )
    return {
        (one.prompt, one.sampled_prompt, answer): found
        for one, tokens in zip(different, itertools.chain.from_iterable(chunks), strict=True)
        for answer, found in zip(one.answers, tokens, strict=True)
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersTokenizer:
    """A chat template and a tokenizer, for answers to one prompt at a time.

    Attributes:
        template: renders prompts and texts.
        tokenizer: the model's.
        max_tokens: of a prompt and an answer.
        policy: see `AnswersConfig.truncation`.
    """

    template: ChatTemplate
    tokenizer: "PreTrainedTokenizerBase"
    max_tokens: int
    policy: TruncationPolicy

    def __call__(self, one: AnswersToPrompt) -> list[AnswerTokens | str]:
        """Returns the tokens of each answer after the same prompt, or why it has none."""
        are_of_here = sampled_for(one.prompt, one.sampled_prompt, self.template, self.tokenizer)
        as_sampled = {
            answer: are_of_here and says(answer, self.template, self.tokenizer)
            for answer in one.answers
        }
        # Messages that the model was not given are not put before its sampled answer.
        dropped = 0
        if any(as_sampled.values()):
            assert one.sampled_prompt is not None
            dropped = one.sampled_prompt.messages_dropped
        num_system = int(bool(one.prompt) and one.prompt[0].role == "system")
        most = len(one.prompt) - num_system - 1

        def behind(number: int) -> list[AnswerTokens | str]:
            return self._behind(without_oldest(one.prompt, number), as_sampled)

        found = behind(dropped)
        if self.policy == "drop_row" or TOO_LONG not in found or most <= dropped:
            return found
        shortest = behind(most)
        # Cuts as little as possible so that every answer fits that fits after the shortest prompt.
        for number in range(dropped + 2, most + 1, 2):
            if _which_fit(found) == _which_fit(shortest):
                return found
            found = behind(number) if number < most else shortest
        return found

    def _behind(
        self, prompt: Messages, as_sampled: dict[AnswerToTokenize, bool]
    ) -> list[AnswerTokens | str]:
        """Returns the answers after this prompt; those above the limit have no tokens."""
        prompt_ids = functools.cache(lambda: self.template.prompt(prompt, self.tokenizer))
        found: list[AnswerTokens | str] = []
        for answer, use_ids in as_sampled.items():
            try:
                tokens = (
                    _behind_ids(prompt_ids(), answer) if use_ids else self._rendered(prompt, answer)
                )
            except ValueError:
                found.append(NOT_RENDERED)
                continue
            found.append(tokens if len(tokens.token_ids) <= self.max_tokens else TOO_LONG)
        return found

    def _rendered(self, prompt: Messages, answer: AnswerToTokenize) -> AnswerTokens:
        template, tokenizer = self.template, self.tokenizer
        if not answer.sampled.ended:
            *earlier, last = answer.messages
            before = template.prompt((*prompt, *earlier), tokenizer)
            whole = template.unfinished((*prompt, *earlier), last.content, tokenizer)
            if len(whole) == len(before):
                raise ValueError("the answer was cut off before its first token")
            return _all_after(len(before), whole, as_sampled=False)
        rendered = template.render((*prompt, *answer.messages), tokenizer)
        trained_T = np.array(rendered.trained_mask, np.bool_)
        end = np.flatnonzero(trained_T)[-1] + 1
        is_answer_T = np.zeros(len(trained_T), np.bool_)
        spoken = [turn for turn in rendered.turns if turn.role == "assistant"]
        for turn in spoken[-_num_turns(answer.messages) :]:
            is_answer_T[turn.content_start : turn.end] = True
        is_answer_T &= trained_T
        return AnswerTokens(
            np.array(rendered.token_ids[:end], np.int32), is_answer_T[:end], as_sampled=False
        )


def make_answer(tokens: AnswerTokens, prompt: Messages, continuation: Messages) -> Answer:
    """Makes an answer with its counts for reports."""
    spoken = [message for message in continuation if message.role == "assistant"]
    characters = sum(len(message.content) for message in spoken)
    num_turns = len(spoken) + _num_turns(prompt)
    return Answer(tokens.token_ids, characters, num_turns, tokens.is_answer, tokens.as_sampled)


def case_of(comparison: Comparison, field: str | None) -> str:
    """Returns the key by which a pair is held out and resampled, see `ComparisonsConfig`.

    Raises:
        ValueError: the pair has no such field.
    """
    if field is None:
        return dialogue_text(comparison.messages)
    if field not in comparison.extra:
        raise ValueError(
            f"data.group_field={field!r}: comparison {comparison.id!r} has no such field; it has "
            f"{sorted(comparison.extra)}"
        )
    return str(comparison.extra[field])


def groups_of(
    told: Sequence[Told],
    tokens: dict[AnswerKey, AnswerTokens | str],
    account: Account,
    purpose: str,
) -> tuple[Group, ...]:
    """Returns the groups in the order of their first pairs; counts what is unusable."""
    by_prompt: dict[tuple[str, str], list[Told]] = {}
    for one in told:
        by_prompt.setdefault((one.case, one.comparison.group), []).append(one)
    groups = []
    for (case, _), members in by_prompt.items():
        answers: dict[bytes, tuple[int, Answer]] = {}
        pairs = []
        for member in members:
            comparison = member.comparison
            both = _both_answers(comparison, tokens)
            if isinstance(both, str):
                account.leave_out(both, member.place)
                continue
            account.use(purpose)
            # By their tokens: the model cannot distinguish answers of the same tokens.
            chosen, rejected = (
                answers.setdefault(answer.token_ids.tobytes(), (len(answers), answer))[0]
                for answer in both
            )
            pairs.append(
                Pair(chosen, rejected, comparison.p_chosen, comparison.margin, comparison.source)
            )
        if pairs:
            group = tuple(answer for _, answer in answers.values())
            groups.append(Group(members[0].comparison.id, case, group, tuple(pairs)))
    return tuple(groups)


def answers_of(comparison: Comparison) -> AnswersToPrompt:
    """Returns chosen and rejected, with how they were sampled as far as the file says.

    Raises:
        ValueError: fields such as `chosen_token_ids` are invalid.
    """
    extra = comparison.extra
    try:
        answers = tuple(
            AnswerToTokenize(unmarked(messages), Sampled.from_fields(extra, prefix=f"{name}_"))
            for name, messages in (
                ("chosen", comparison.chosen),
                ("rejected", comparison.rejected),
            )
        )
        prompt = unmarked(comparison.messages)
        return AnswersToPrompt(prompt, answers, SampledPrompt.from_fields(extra))
    except ValueError as error:
        raise ValueError(f"comparison {comparison.id!r}: {error}") from error


def groups_hash(groups: Sequence[Group]) -> str:
    """Returns a hash of all tokens and labels of some groups."""
    whole = hashlib.sha256()
    for group in groups:
        whole.update(repr((group.case, group.pairs, len(group.answers))).encode())
        for answer in group.answers:
            whole.update(answer.token_ids.tobytes() + b"\0")
    return whole.hexdigest()[:32]


def _told(cfg: ComparisonsConfig, account: Account) -> Iterator[Told]:
    for source in cfg.sources:
        for path in source.paths:
            for place, comparison in _read(source, path, account):
                case = case_of(comparison, cfg.group_field)
                held_out = source.held_out_by == "always" or (
                    source.held_out_by == "hash" and cfg.held_out.holds_out(case)
                )
                yield Told(comparison, place, case, held_out, source.held_out_by == "always")


def _read(
    source: ComparisonSource, path: str, account: Account
) -> Iterator[tuple[str, Comparison]]:
    """Yields the preference pairs of a file with their places."""
    if source.reads == "comparisons":
        comparisons = read_comparisons(path, source=source.name, encoding=source.encoding)
        yield from placed(comparisons)
        account.add_rows(comparisons)
        return
    make = mismatched_references if source.reads == "dialogues" else spoiled_answers
    reading = read_dialogues(path, encoding=source.encoding)
    dialogues = list(reading)
    account.add_rows(reading)
    # A message that is not to be trained must not be chosen either.
    good = [one for one in dialogues if one.messages == unmarked(one.messages)]
    account.put_aside(NOT_TO_LEARN, len(dialogues) - len(good))
    for one in make(good):
        name = one.source if source.name is None else f"{one.source}:{source.name}"
        yield f"{path}: {one.id}", dataclasses.replace(one, source=name)


def _both_answers(
    comparison: Comparison, tokens: dict[AnswerKey, AnswerTokens | str]
) -> tuple[Answer, Answer] | str:
    """Returns chosen and rejected as tokens, or why the pair is unusable."""
    prompt, both, sampled_prompt = answers_of(comparison)
    answers = []
    for one in both:
        found = tokens[prompt, sampled_prompt, one]
        if isinstance(found, str):
            return found
        answers.append(make_answer(found, prompt, one.messages))
    chosen, rejected = answers
    if np.array_equal(chosen.token_ids, rejected.token_ids):
        return SAME_TOKENS
    return chosen, rejected


def _which_fit(tokens: Sequence[AnswerTokens | str]) -> list[bool]:
    return [isinstance(one, AnswerTokens) for one in tokens]


def _behind_ids(prompt_ids: Sequence[int], answer: AnswerToTokenize) -> AnswerTokens:
    """Returns a sampled answer after its prompt."""
    assert answer.sampled.token_ids is not None
    return _all_after(len(prompt_ids), [*prompt_ids, *answer.sampled.token_ids], as_sampled=True)


def _all_after(start: int, token_ids: Sequence[int], *, as_sampled: bool) -> AnswerTokens:
    is_answer_T = np.arange(len(token_ids)) >= start
    return AnswerTokens(np.array(token_ids, np.int32), is_answer_T, as_sampled)


def _num_turns(messages: Messages) -> int:
    return sum(message.role == "assistant" for message in messages)
