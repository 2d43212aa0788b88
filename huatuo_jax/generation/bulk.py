"""Answers to a file of prompts, in a run that can be killed and started again.

Several processes answer together, on one mesh; the first of them writes the file.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from huatuo_jax import multi_host
from huatuo_jax.atomic import write_file
from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.checkpoint import models
from huatuo_jax.data.accounting import Account, check_share, placed
from huatuo_jax.data.readers import read_prompts
from huatuo_jax.generation.answers_file import AnswersFile
from huatuo_jax.generation.bulk_progress import BulkProgress, Clock
from huatuo_jax.generation.bulk_tasks import Task, make_record, make_request, make_tasks
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.report import EngineReport
from huatuo_jax.generation.requests import Answer, SamplingConfig
from huatuo_jax.generation.saved_model import SavedModel, compute_config, open_saved_model
from huatuo_jax.generation.slots import slots_for
from huatuo_jax.progress import tell
from huatuo_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """A file of prompts to answer.

    Attributes:
        model: folder of a model of either form, or a hub id.
        prompts: file of prompts, see `huatuo_jax.data.readers`.
        encoding: of the prompts; None tells it by evidence, see `huatuo_jax.data.encodings`.
        output: the answers file.
        ignore_config_fields: of the model's `config.json`, see `models.find_model`.
        template: chat template by name; `tokenizer` for the tokenizer's own.
        default_system: its system text; None for the template's own.
        template_date: the date that a tokenizer's own template prints, see `templates.by_name`.
        num_samples: answers to each prompt.
        sampling: how; the stop tokens of template, tokenizer and model are added.
        seed: with a prompt's id it decides that prompt's answers.
        chunk_size: prompts whose answers are written together. Slots run empty at a chunk's end,
            so it should be many times the number of slots.
        drop_oldest_turns: where a dialogue and `max_new_tokens` do not fit the context, leave out
            its oldest exchanges; the record then says how many messages went.
        max_left_out_share: share of the prompts that may be left out, because they leave no room
            for an answer or the template cannot render them.
        max_length: tokens of prompt and answer; None for what the longest prompt needs.
        slots: answers decoded at once; None for as many as a chunk has, 64 at most.
        compute_dtype: None for float32 on CPU, bfloat16 elsewhere.
        mesh: how the devices are divided.
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
        """Raise ValueError for a field that cannot be."""
        for name in ("num_samples", "chunk_size", "slots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        check_share(self.max_left_out_share, name="max_left_out_share")


class _Plan(NamedTuple):
    """What is to be done, and `settings`, which decide the output's content.

    `account` says what became of each prompt.
    """

    model: SavedModel
    tasks: list[Task]
    sampling: SamplingConfig
    max_length: int
    settings: dict[str, Any]
    account: Account


def report_path(output: str | os.PathLike[str]) -> str:
    """The account of an answers file's prompts, which stands beside it."""
    return f"{os.fspath(output)}.report.json"


def run_bulk(
    cfg: BulkConfig,
    on_progress: Callable[[BulkProgress], None] | None = None,
    say: Callable[[str], object] = tell,
) -> EngineReport | None:
    """Answers every prompt that fits and that the output does not hold yet.

    Args:
        cfg: what to do.
        on_progress: called every ten seconds or so, and at the end of each chunk, in the first
            process.
        say: called with what the user should know of the prompts before any is answered, in the
            first process.

    Returns:
        What the engine did; None where the output was complete. The file is whole for all
        processes then.

    Raises:
        ValueError: bad prompts, a model without logits, settings that cannot be, an output made
            otherwise; before anything is decoded.
        FileNotFoundError: there is no such model.
        OSError: the output cannot be written.
    """
    plan = _plan(cfg)
    tasks = plan.tasks
    ids = [task.prompt.id for task in tasks]
    size = cfg.chunk_size
    multi_host.check_same(f"what decides {cfg.output}", plan.settings)
    with contextlib.ExitStack() as stack:
        output = None
        with multi_host.first_then_others("answers file"):
            if multi_host.is_first():
                output = stack.enter_context(
                    AnswersFile(cfg.output, ids=ids, chunk_size=size, settings=plan.settings)
                )
                _report(cfg, plan.account, say)
        # Where to go on is told by the one that holds the file.
        first = multi_host.gather("answered", None if output is None else output.num_records)[0]
        if first == len(tasks):
            return None
        engine = _open_engine(cfg, plan)
        clock = Clock(first, len(tasks), on_progress if multi_host.is_first() else None)
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
    multi_host.barrier("answers written")
    return engine.report


def _plan(cfg: BulkConfig) -> _Plan:
    """Everything that can be told without the weights; what a user can cause is raised here."""
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
    write_file(pathlib.Path(report_path(cfg.output)), f"{text}\n")
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
    """What the engine would say too, before anything is read or tokenised."""
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
