"""Scores every answer in a file with a reward model: dialogues, comparisons, or several answers."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import distributed
from huatuo_jax.core.files import as_path, write_rows
from huatuo_jax.core.progress import progress_bar, tell
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.accounting import Account, check_share
from huatuo_jax.data.answers import AnswerToTokenize, Sampled, SampledPrompt
from huatuo_jax.data.chat.template import TruncationPolicy
from huatuo_jax.data.files import Row, read_rows
from huatuo_jax.data.readers import read_records
from huatuo_jax.data.records import Comparison, Dialogue, Message, Prompt, unmarked
from huatuo_jax.generation.requests import slots_for
from huatuo_jax.generation.saved_model import compute_config, open_saved_model
from huatuo_jax.ppo.rewards import AnswerScoreConfig
from huatuo_jax.preferences.data import (
    Answer,
    AnswerKey,
    AnswersConfig,
    AnswersToPrompt,
    AnswerTokens,
    answers_of,
    make_answer,
    tokenize_answers,
)
from huatuo_jax.training.scoring import GivenAnswer, Normalization, Scorer, load_normalization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """A file of answers to score.

    Attributes:
        model: folder of a reward model of ours, or of transformers' sequence classification with
            one label, or a hub id.
        input: file of dialogues, of comparisons, or of several answers a prompt.
        encoding: of the input; None tells it by evidence, see `huatuo_jax.data.text`.
        output: JSON Lines to write; replaced when all is scored.
        ignore_config_fields: of the model's `config.json`, see `models.find_model`.
        template: chat template by name; `tokenizer` for the tokenizer's own.
        default_system: its system text; None for the template's own.
        template_date: the date that a tokenizer's own template prints, see `templates.by_name`.
        truncation: what becomes of a dialogue longer than `max_length`, see `AnswersConfig`.
        max_length: tokens of a dialogue; None for the model's positions.
        max_left_out_share: share of the answers that may stay without a score, because they are
            too long or the template cannot render them.
        rows_at_once: rows that go through the model together, a multiple of the mesh's shards.
        row_length: tokens of a row, which holds several answers; None for the longest's.
        compute_dtype: None for float32 on CPU, bfloat16 elsewhere.
        data: mesh axis, see `sharding.make_mesh`.
        fsdp: mesh axis.
        tensor: mesh axis.
        rule: what a score counts, above all that of an answer that was cut off.
    """

    model: str
    input: str
    output: str
    ignore_config_fields: tuple[str, ...] = ()
    encoding: str | None = None
    template: str = "huatuogpt"
    default_system: str | None = None
    template_date: str | None = None
    truncation: TruncationPolicy = "drop_oldest_turns"
    max_length: int | None = None
    max_left_out_share: float = 0.1
    rows_at_once: int = 8
    row_length: int | None = None
    compute_dtype: str | None = None
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    rule: AnswerScoreConfig = AnswerScoreConfig()

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid size, output or rule."""
        if self.rule != self.rule.outside_training:
            raise ValueError(
                f"on_truncation={self.rule.on_truncation!r}, scale={self.rule.scale!r}: a critic "
                "and running scores are there in training only"
            )
        if not self.output or as_path(self.output).is_dir():
            raise ValueError(f"output={self.output!r} is no name of a file to write")
        if as_path(self.input).resolve() == as_path(self.output).resolve():
            raise ValueError(f"input and output are both {self.output}; they should differ")
        for name in ("max_length", "rows_at_once", "row_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_share(self.max_left_out_share, name="max_left_out_share")


class Scored(NamedTuple):
    """Outcome of scoring a file.

    Attributes:
        num_records: in the file.
        num_answers: of all records.
        num_without: answers without a score.
        num_as_sampled: answers that were scored by the ids that a model sampled.
        num_retokenized: answers whose ids are of another tokenizer, template or text, so that
            their text was scored.
        num_cut_off: scored answers that have no end.
        mean: of the raw scores.
    """

    num_records: int
    num_answers: int
    num_without: int
    num_as_sampled: int
    num_retokenized: int
    num_cut_off: int
    mean: float | None

    def __str__(self) -> str:
        """Describes it in one line."""
        line = f"{self.num_records} records, {self.num_answers} answers"
        if self.num_without:
            line += f", {self.num_without} without a score (too long, or not in the template)"
        if self.num_as_sampled:
            line += f", {self.num_as_sampled} scored by their sampled ids"
        if self.num_retokenized:
            line += (
                f", {self.num_retokenized} by their text, as their ids are of another tokenizer, "
                "template or text"
            )
        if self.num_cut_off:
            line += f", {self.num_cut_off} cut off before their end"
        return line if self.mean is None else f"{line}, mean score {self.mean:.4f}"


class Answered(NamedTuple):
    """A record of a file with its answers.

    Attributes:
        record: as JSON, extra fields kept.
        to_prompt: the prompt and its answers, which end with the assistant.
        several: whether the record can hold more than one, as opposed to a dialogue.
        place: file and line of the record.
    """

    record: dict[str, Any]
    to_prompt: AnswersToPrompt
    several: bool
    place: str

    @property
    def keys(self) -> list[AnswerKey]:
        """Each answer behind its prompt, as `tokenize_answers` names it."""
        prompt, answers, sampled_prompt = self.to_prompt
        return [(prompt, sampled_prompt, answer) for answer in answers]


@distributed.joined()
def main(flags: ScoreConfig) -> None:
    """Scores, and prints how it went."""
    scored = score_file(flags)
    if distributed.is_first():
        print(scored)
        print(f"written: {flags.output}")


def score_file(cfg: ScoreConfig, say: Callable[[str], object] = tell) -> Scored:
    """Writes each record of the input with the scores of its answers.

    A dialogue gets `score`, a record of several answers `scores` in their order (of a comparison:
    chosen, rejected). They are raw; where the model was stored with a normalization,
    `normalized_score` or `normalized_scores` is written with them. `reward` or `rewards` is what
    PPO's reward holds of the score under `cfg.rule`, in raw units where nothing is stored. An
    answer that does not fit, or that the template cannot render, has null.

    Args:
        cfg: what to score.
        say: called with what the user should know of the answers before any is scored, in the
            first process.

    Raises:
        ValueError: an invalid file, model or setting, before anything is compiled.
        FileNotFoundError: there is no such model.
        OSError: the output cannot be written.
    """
    model = open_saved_model(
        cfg.model,
        head="score",
        template=cfg.template,
        default_system=cfg.default_system,
        template_date=cfg.template_date,
        mesh=MeshConfig(data=cfg.data, fsdp=cfg.fsdp, tensor=cfg.tensor),
        ignore_config_fields=cfg.ignore_config_fields,
    )
    normalization, positions = load_normalization(model.info.folder), model.info.cfg.max_positions
    limit = cfg.max_length or min(positions, cfg.row_length or positions)
    if limit > positions:
        raise ValueError(f"max_length={limit} must be at most the model's {positions} positions")
    answers_cfg = AnswersConfig(
        template=cfg.template,
        default_system=cfg.default_system,
        template_date=cfg.template_date,
        truncation=cfg.truncation,
        max_length=limit,
    )
    account = Account("answers")
    records = list(read_answered(cfg.input, account, encoding=cfg.encoding))
    keys = [key for record in records for key in record.keys]
    if not keys:
        raise ValueError(f"{cfg.input}: none of its records has an answer to score")
    to_prompts = (record.to_prompt for record in records)
    tokens = tokenize_answers(to_prompts, answers_cfg, model.tokenizer)
    without = [found for found in tokens.values() if isinstance(found, str)]
    if len(without) == len(tokens):
        raise ValueError(
            f"{cfg.input}: none of its {len(keys)} answers can be scored with"
            f" max_length={limit}: {', '.join(sorted(set(without)))}"
        )
    for record in records:
        for key in record.keys:
            tokens_of = tokens[key]
            if isinstance(tokens_of, str):
                account.leave_out(tokens_of, record.place)
            else:
                account.use("to score")
    account.check(cfg.max_left_out_share, name="max_left_out_share", limit=f"max_length={limit}")
    if distributed.is_first():
        for line in account.lines():
            say(line)
    scorer = Scorer(
        Transformer(model.info.cfg, compute_config(cfg.compute_dtype)),
        {"params": model.load_params()},
        mesh=model.mesh,
        rows_at_once=slots_for(cfg.rows_at_once, model.mesh),
        row_length=cfg.row_length,
    )
    scores = _scores(scorer, tokens)
    fields = _fields(scores, normalization, cfg.rule)
    distributed.by_first("scores", lambda: write_rows(cfg.output, _scored_records(records, fields)))
    found = [scores[key] for key in keys]
    known = [score for score in found if score is not None]
    as_sampled = [_is_as_sampled(tokens[key]) for key in keys]
    has_ids = [key[2].sampled.token_ids is not None for key in keys]
    return Scored(
        num_records=len(records),
        num_answers=len(keys),
        num_without=len(keys) - len(known),
        num_as_sampled=sum(as_sampled),
        num_retokenized=sum(
            ids and not used and scores[key] is not None
            for key, ids, used in zip(keys, has_ids, as_sampled, strict=True)
        ),
        num_cut_off=sum(not key[2].sampled.ended and scores[key] is not None for key in keys),
        mean=float(np.mean(known)) if known else None,
    )


def read_answered(
    path: str, account: Account, *, encoding: str | None = None
) -> Iterator[Answered]:
    """Reads the records of a file of dialogues, of comparisons, or of several answers a prompt.

    Args:
        path: the file.
        account: its rows are counted there.
        encoding: of a text file; None tells it by evidence.

    Raises:
        ValueError: it cannot be read, or holds records without an answer.
    """
    rows = read_rows(path, encoding=encoding)
    first = next((row for row in rows if isinstance(row, Row)), None)
    if first is not None and _is_answers_record(first.value):
        for answered in _read_answers_file(path, encoding):
            account.rows += 1
            account.rows_used += 1
            yield answered
        return
    reading = read_records(path, encoding=encoding, empty_answers=True)
    for record in reading:
        if isinstance(record, Dialogue):
            *prompt, answer = unmarked(record.messages)
            to_prompt = AnswersToPrompt(tuple(prompt), (AnswerToTokenize((answer,)),))
        elif isinstance(record, Comparison):
            to_prompt = answers_of(record)
        else:
            kind = type(record).__name__
            raise ValueError(f"{path}: record {record.id!r} is a {kind}, which holds no answer")
        several, place = isinstance(record, Comparison), f"{path}:{reading.line}"
        yield Answered(record.to_json(), to_prompt, several, place)
    account.add_rows(reading)


def read_answers(
    path: str,
    cfg: AnswersConfig,
    tokenizer: "PreTrainedTokenizerBase",
    account: Account | None = None,
) -> list[Answer]:
    """Reads all answers of a file as tokens; those that do not fit are left out and counted.

    Args:
        path: the file.
        cfg: how they are rendered.
        tokenizer: the model's.
        account: all rows and answers are counted there.

    Raises:
        ValueError: as `read_answered`, or more answers do not fit than `cfg.max_left_out_share`.
    """
    account = Account("answers") if account is None else account
    records = list(read_answered(path, account))
    tokens = tokenize_answers((record.to_prompt for record in records), cfg, tokenizer)
    answers = []
    for record in records:
        for key in record.keys:
            found = tokens[key]
            if isinstance(found, str):
                account.leave_out(found, record.place)
                continue
            account.use("to be scored")
            answers.append(make_answer(found, key[0], key[2].messages))
    limit = f"max_length={cfg.max_length}"
    account.check(cfg.max_left_out_share, name="max_left_out_share", limit=limit)
    return answers


def answers_hash(answers: Sequence[Answer]) -> str:
    """Hashes all tokens."""
    whole = hashlib.sha256()
    for answer in answers:
        whole.update(answer.token_ids.tobytes() + b"\0")
    return whole.hexdigest()[:32]


def _is_answers_record(row: object) -> bool:
    """Tells records as `huatuo_jax.generation` writes them; scored lists are comparisons."""
    if not isinstance(row, Mapping) or not {"id", "messages", "source", "answers"} <= row.keys():
        return False
    answers = row["answers"]
    return isinstance(answers, list) and all(
        isinstance(one, Mapping) and "text" in one and "score" not in one for one in answers
    )


def _read_answers_file(path: str, encoding: str | None) -> Iterator[Answered]:
    for row in read_rows(path, encoding=encoding):
        if not isinstance(row, Row):
            raise ValueError(str(row))
        if not _is_answers_record(row.value):
            raise ValueError(
                f"{row.file} line {row.line}: not an answers record (id, messages, source, answers "
                "with text), while the first one is"
            )
        prompt = Prompt.from_json(row.value).messages
        try:
            answers = tuple(map(_answer, row.value["answers"]))
            to_prompt = AnswersToPrompt(prompt, answers, SampledPrompt.from_fields(row.value))
        except ValueError as error:
            raise ValueError(f"{row.file} line {row.line}: {error}") from error
        yield Answered(dict(row.value), to_prompt, True, f"{row.file}:{row.line}")


def _answer(fields: Mapping[str, Any]) -> AnswerToTokenize:
    if not isinstance(fields["text"], str):
        raise ValueError("an answer's text is no text")
    return AnswerToTokenize((Message("assistant", fields["text"]),), Sampled.from_fields(fields))


def _is_as_sampled(found: AnswerTokens | str) -> bool:
    return isinstance(found, AnswerTokens) and found.as_sampled


def _scores(
    scorer: Scorer, tokens: dict[AnswerKey, AnswerTokens | str]
) -> dict[AnswerKey, float | None]:
    """Returns the raw score of each answer, None for one that has no tokens."""
    scores: dict[AnswerKey, float | None] = dict.fromkeys(tokens)
    rendered = {key: found for key, found in tokens.items() if isinstance(found, AnswerTokens)}
    with progress_bar(f"scoring {len(rendered)} answers", "rows") as on_progress:
        found = scorer.scores(
            [GivenAnswer(one.token_ids, 0) for one in rendered.values()], on_progress
        )
    return scores | dict(zip(rendered, map(float, found), strict=True))


def _scored_records(
    records: Sequence[Answered],
    fields: Mapping[str, Mapping[AnswerKey, float | None]],
) -> Iterator[dict[str, Any]]:
    for record in records:
        for_record = {name: [of[key] for key in record.keys] for name, of in fields.items()}
        yield record.record | {
            f"{name}s" if record.several else name: values if record.several else values[0]
            for name, values in for_record.items()
        }


def _fields(
    scores: Mapping[AnswerKey, float | None],
    normalization: Normalization | None,
    rule: AnswerScoreConfig,
) -> dict[str, Mapping[AnswerKey, float | None]]:
    """Returns what is written of each answer, by name."""
    known = {key: score for key, score in scores.items() if score is not None}
    none: dict[AnswerKey, float | None] = dict.fromkeys(scores)
    scaled_N = np.array(list(known.values()), np.float64)
    found: dict[str, Mapping[AnswerKey, float | None]] = {"score": scores}
    if normalization is not None:
        normalized_N = normalization.apply(scaled_N)
        found["normalized_score"] = none | dict(zip(known, normalized_N.tolist(), strict=True))
        scaled_N = scaled_N if rule.scale == "raw" else normalized_N
    rewards_N = rule.rewards(
        jnp.asarray(scaled_N, jnp.float32),
        jnp.array([key[2].sampled.ended for key in known], jnp.bool_),
    )
    return found | {"reward": none | dict(zip(known, rewards_N.tolist(), strict=True))}
