"""Answers a file of prompts, in a run that can be killed and resumed.

Several processes answer together, on one mesh; the first of them writes the file. Beside
`NAME.jsonl` is `NAME.jsonl.settings.json`, which holds everything that decides its content. The
work is cut into chunks by the input alone; a killed run's unfinished chunk is cut off and done
again, so that the file is the same byte for byte.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.checkpoint import models
from huatuo_jax.core import distributed, files
from huatuo_jax.core.files import AppendedFile, Line, as_path, write_file
from huatuo_jax.core.progress import tell
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.accounting import Account, check_share, placed
from huatuo_jax.data.readers import read_prompts
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.prompts import Task, make_record, make_request, make_tasks
from huatuo_jax.generation.requests import Answer, EngineReport, SamplingConfig, slots_for
from huatuo_jax.generation.saved_model import SavedModel, compute_config, open_saved_model

_PROGRESS_EVERY_S = 10.0


@dataclasses.dataclass(frozen=True)
class BulkProgress:
    """The progress of a run: prompts of the file, and tokens of this run."""

    prompts_done: int
    num_prompts: int
    tokens: int
    seconds: float
    seconds_left: float

    def __str__(self) -> str:
        """Returns the progress in one line; a speed once there is one beside compilation."""
        done = f"{self.prompts_done} of {self.num_prompts} prompts"
        if math.isinf(self.seconds_left):
            return f"{done}, {self.tokens} tokens so far"
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return f"{done}, {speed:.1f} tokens/s, {self.seconds_left:.0f} s left"


class Clock:
    """Reports tokens, speed and time left."""

    def __init__(
        self, start: int, num_prompts: int, on_progress: Callable[[BulkProgress], None] | None
    ) -> None:
        """Starts the clock.

        Args:
            start: number of prompts done before.
            num_prompts: number of all prompts.
            on_progress: called about every ten seconds, and after each chunk.
        """
        self._start, self._num_prompts, self._say = start, num_prompts, on_progress
        self._done, self._tokens = start, 0
        self._started_s = self._said_s = time.monotonic()

    def watch(self, answers: Iterator[Answer]) -> Iterator[Answer]:
        """Yields the answers and counts them."""
        for answer in answers:
            self._tokens += answer.usage.completion_tokens
            if time.monotonic() - self._said_s >= _PROGRESS_EVERY_S:
                self._tell()
            yield answer

    def chunk_done(self, num_records: int) -> None:
        """Records that a chunk is on disk."""
        self._done = num_records
        self._tell()

    def _tell(self) -> None:
        self._said_s = time.monotonic()
        seconds, done = self._said_s - self._started_s, self._done - self._start
        left = seconds / done * (self._num_prompts - self._done) if done else math.inf
        if self._say is not None:
            self._say(BulkProgress(self._done, self._num_prompts, self._tokens, seconds, left))


class AnswersFile:
    """An answers file opened for one run; a context manager.

    Attributes:
        num_records: records that whole chunks hold.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ids: Sequence[str],
        chunk_size: int,
        settings: Mapping[str, Any],
    ) -> None:
        """Opens or creates the file, and cuts off an unfinished chunk.

        Args:
            path: the file.
            ids: of all records it is to hold, in order.
            chunk_size: records of a chunk.
            settings: plain values that decide the content.

        Raises:
            ValueError: the file is there with other settings or other records, or another process
                writes it.
            OSError: it cannot be written.
        """
        self._path = as_path(path)
        self._ids, self._chunk_size = ids, chunk_size
        settings = json.loads(json.dumps(dict(settings)))
        self._check_settings(settings)
        self._file = AppendedFile(self._path, locked=True)
        try:
            self.num_records, end = self._whole_chunks()
            self._write_settings(settings)
            self._file.cut(end)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswersFile":
        """Returns the file itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file."""
        self._file.close()

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends one chunk and flushes it to disk."""
        expected = self._ids[self.num_records : self.num_records + self._chunk_size]
        assert [record["id"] for record in records] == list(expected)
        self._file.append(records)
        self._file.sync()
        self.num_records += len(records)

    @property
    def _settings_path(self) -> pathlib.Path:
        return self._path.with_name(f"{self._path.name}.settings.json")

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        if not self._path.exists() or files.size_of(self._path) == 0:
            return
        if not self._settings_path.is_file():
            raise ValueError(
                f"{self._path} is there, and {self._settings_path.name}, which says how it was "
                "made, is not: choose another output"
            )
        found = json.loads(self._settings_path.read_text(encoding="utf-8"))
        names = sorted(settings.keys() | found.keys())
        other = [name for name in names if found.get(name) != settings.get(name)]
        if other:
            changes = ", ".join(
                f"{name} {found.get(name)!r}, now {settings.get(name)!r}" for name in other
            )
            raise ValueError(
                f"{self._path} was made with {changes}: choose another output, or remove it"
            )

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        # Renamed into place, and before the first answer: a file of answers never lacks it.
        files.write_file(self._settings_path, json.dumps(settings, indent=2, ensure_ascii=False))

    def _whole_chunks(self) -> tuple[int, int]:
        """Returns the number of records in complete chunks, and where in the file they end."""
        whole = (0, 0)
        for num_records, line in enumerate(self._file.lines(), start=1):
            self._check_line(num_records - 1, line)
            if num_records % self._chunk_size == 0 or num_records == len(self._ids):
                whole = (num_records, line.end)
        return whole

    def _check_line(self, index: int, line: Line) -> None:
        if "id" not in line.row:
            raise ValueError(f"{self._path}:{line.number}: not an answers record, it has no id")
        if index >= len(self._ids) or line.row["id"] != self._ids[index]:
            raise ValueError(
                f"{self._path}:{line.number}: id {line.row['id']!r} is not the one due there: "
                "choose another output"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """A file of prompts to answer.

    Attributes:
        model: folder of a model of either form, or a hub id.
        prompts: file of prompts, see `huatuo_jax.data.readers`.
        encoding: of the prompts; None detects it, see `huatuo_jax.data.files`.
        output: the answers file.
        ignore_config_fields: of the model's `config.json`, see `models.find_model`.
        template: chat template by name; `tokenizer` for the tokenizer's own.
        default_system: its system text; None for the template's own.
        template_date: the date that a tokenizer's own template prints, see `templates.by_name`.
        num_samples: answers to each prompt.
        sampling: sampling settings; the stop tokens of template, tokenizer and model are added.
        seed: with a prompt's id it decides that prompt's answers.
        chunk_size: prompts whose answers are written together. Slots run empty at a chunk's end,
            so it should be many times the number of slots.
        drop_oldest_turns: where a dialogue and `max_new_tokens` do not fit the context, leave out
            its oldest exchanges; the record then holds the number of messages left out.
        max_left_out_share: largest share of the prompts that may be left out, because they leave no
            room for an answer or the template cannot render them.
        max_length: tokens of prompt and answer; None for those that the longest prompt needs.
        slots: answers decoded at once; None for those of a chunk, 64 at most.
        compute_dtype: None for float32 on CPU, bfloat16 elsewhere.
        mesh: axes of the device mesh.
    """

    model: str
    prompts: str
    output: str
    ignore_config_fields: tuple[str, ...] = ()
    encoding: str | None = None
    template: str = "huatuogpt"
    default_system: str | None = None
    template_date: str | None = None
    num_samples: int = 1
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    chunk_size: int = 256
    drop_oldest_turns: bool = False
    max_left_out_share: float = 0.1
    max_length: int | None = None
    slots: int | None = None
    compute_dtype: str | None = None
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        """Validates the fields."""
        for name in ("num_samples", "chunk_size", "slots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_share(self.max_left_out_share, name="max_left_out_share")


class _Plan(NamedTuple):
    """The work of a run, and `settings`, which decide the output's content.

    `account` counts the prompts by their use.
    """

    model: SavedModel
    tasks: list[Task]
    sampling: SamplingConfig
    max_length: int
    settings: dict[str, Any]
    account: Account


def report_path(output: str | os.PathLike[str]) -> str:
    """Returns the path of the report on an answers file's prompts, which is beside it."""
    return f"{os.fspath(output)}.report.json"


def run_bulk(
    cfg: BulkConfig,
    on_progress: Callable[[BulkProgress], None] | None = None,
    say: Callable[[str], object] = tell,
) -> EngineReport | None:
    """Answers every prompt that fits and that the output does not hold yet.

    Args:
        cfg: model, prompts, output and sampling.
        on_progress: called about every ten seconds, and at the end of each chunk, in the first
            process.
        say: called with lines about the prompts before any is answered, in the first process.

    Returns:
        The engine's report; None if the output was complete. The file is then complete for all
        processes.

    Raises:
        ValueError: bad prompts, a model without logits, invalid settings, an output made with other
            settings; before anything is decoded.
        FileNotFoundError: there is no such model.
        OSError: the output cannot be written.
    """
    plan = _plan(cfg)
    tasks = plan.tasks
    ids = [task.prompt.id for task in tasks]
    size = cfg.chunk_size
    distributed.check_same(f"what decides {cfg.output}", plan.settings)
    with contextlib.ExitStack() as stack:
        output = None
        with distributed.first_then_others("answers file"):
            if distributed.is_first():
                output = stack.enter_context(
                    AnswersFile(cfg.output, ids=ids, chunk_size=size, settings=plan.settings)
                )
                _report(cfg, plan.account, say)
        # The process that holds the file decides where to resume.
        first = distributed.gather("answered", None if output is None else output.num_records)[0]
        if first == len(tasks):
            return None
        engine = _open_engine(cfg, plan)
        clock = Clock(first, len(tasks), on_progress if distributed.is_first() else None)
        for start in range(first, len(tasks), size):
            chunk = tasks[start : start + size]
            requests = [
                make_request(task, plan.sampling, seed=cfg.seed, num_samples=cfg.num_samples)
                for task in chunk
            ]
            groups = _grouped(clock.watch(engine.generate(requests)), len(chunk))
            records = [
                make_record(task, answers, plan.model.template, plan.model.tokenizer)
                for task, answers in zip(chunk, groups, strict=True)
            ]
            if output is not None:
                output.append(records)
            clock.chunk_done(start + len(chunk))
    distributed.barrier("answers written")
    return engine.report


def _plan(cfg: BulkConfig) -> _Plan:
    """Does everything that needs no weights; a user's errors are raised here."""
    model = open_saved_model(
        cfg.model,
        head="lm",
        template=cfg.template,
        default_system=cfg.default_system,
        template_date=cfg.template_date,
        mesh=cfg.mesh,
        ignore_config_fields=cfg.ignore_config_fields,
    )
    backbone, sampling = model.info.cfg, model.with_stops(cfg.sampling)
    reading = read_prompts(cfg.prompts, encoding=cfg.encoding)
    prompts = list(placed(reading))
    limit = cfg.max_length or backbone.max_positions
    _check_positions(backbone, limit)
    account = Account("prompts")
    account.add_rows(reading)
    tasks = make_tasks(
        prompts,
        model.template,
        model.tokenizer,
        max_length=limit,
        max_new_tokens=sampling.max_new_tokens,
        drop_oldest_turns=cfg.drop_oldest_turns,
        least_new_tokens=1,
        account=account,
        purpose="to answer",
    )
    account.check(
        cfg.max_left_out_share, name="max_left_out_share", limit=f"a length of {limit} tokens"
    )
    longest = max(len(task.token_ids) for task in tasks)
    max_length = cfg.max_length or min(longest + sampling.max_new_tokens, limit)
    settings = {
        "model": models.fingerprint(model.info.folder),
        "prompts": _hash_of([prompt.to_json() for _, prompt in prompts]),
        "template": repr(model.template),
        "num_samples": cfg.num_samples,
        "sampling": dataclasses.asdict(sampling),
        "seed": cfg.seed,
        "chunk_size": cfg.chunk_size,
        "max_length": max_length,
        "drop_oldest_turns": cfg.drop_oldest_turns,
    }
    return _Plan(model, tasks, sampling, max_length, settings, account)


def _report(cfg: BulkConfig, account: Account, say: Callable[[str], object]) -> None:
    text = json.dumps(account.to_json(), ensure_ascii=False, indent=2)
    write_file(as_path(report_path(cfg.output)), f"{text}\n")
    for line in account.lines():
        say(line)


def _open_engine(cfg: BulkConfig, plan: _Plan) -> Engine:
    return plan.model.make_engine(
        plan.model.load_params(),
        compute_config(cfg.compute_dtype),
        slots=slots_for(cfg.slots or min(cfg.chunk_size * cfg.num_samples, 64), plan.model.mesh),
        max_length=plan.max_length,
    )


def _check_positions(backbone: BackboneConfig, max_length: int) -> None:
    """Raises the engine's error before anything is read or tokenised."""
    if max_length > backbone.max_positions:
        raise ValueError(
            f"max_length={max_length} must be at most the model's {backbone.max_positions} "
            "positions"
        )


def _grouped(answers: Iterator[Answer], num_requests: int) -> list[list[Answer]]:
    ordered = sorted(answers, key=lambda answer: (answer.request_index, answer.answer_index))
    groups = itertools.groupby(ordered, key=lambda answer: answer.request_index)
    grouped = [list(group) for _, group in groups]
    assert len(grouped) == num_requests
    return grouped


def _hash_of(rows: Sequence[Any]) -> str:
    whole = hashlib.sha256()
    for row in rows:
        whole.update(repr(row).encode())
    return whole.hexdigest()[:32]


@distributed.joined()
def main(flags: BulkConfig) -> None:
    """Generates, and prints the report."""
    report = run_bulk(flags, lambda progress: tell(str(progress)))
    if distributed.is_first():
        print(report or "nothing left to do", f"written: {flags.output}", sep="\n")
