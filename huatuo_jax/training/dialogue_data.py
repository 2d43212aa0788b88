"""The dialogues of a run, from the files that a config names to batches of packed rows."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from huatuo_jax.core.config import operational
from huatuo_jax.data.accounting import TRAINED_ON, Account
from huatuo_jax.data.batches import (
    BatchIterator,
    PrefetchConfig,
    RowConfig,
    RowStream,
    evaluation_batches,
)
from huatuo_jax.data.chat import templates
from huatuo_jax.data.chat.template import ChatTemplate, TrainedTurns, TruncationPolicy
from huatuo_jax.data.mixture import DuplicatesConfig, HeldOutConfig, Mixture, SourceShare
from huatuo_jax.data.pipeline import PrepareConfig, Prepared, prepare
from huatuo_jax.data.readers import DialogueSource, HeldOutBy, Keywords
from huatuo_jax.data.records import Kind
from huatuo_jax.data.tokenizing import Progress, TemplateTokenizer
from huatuo_jax.training.loop import host_share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of dialogues and its share of the mixture.

    Attributes:
        name: its name in reports.
        paths: files, folders or hub names; their content decides, not their place.
        kind: the kind of all its dialogues; None takes the rows' own.
        adapter: the name of the adapter of an odd format; None for the common ones.
        encoding: of text files; None tells it by evidence, see `huatuo_jax.data.text`.
        epochs: passes over it in an epoch of the mixture, 1 unless a weight is given.
        weight: its share of the mixture's examples instead.
        limit: so many of its dialogues at most.
        held_out_by: `hash`, `never` or `always`.
    """

    name: str
    paths: tuple[str, ...] = operational(())
    kind: Kind | None = None
    adapter: str | None = None
    encoding: str | None = None
    epochs: float | None = None
    weight: float | None = None
    limit: int | None = None
    held_out_by: HeldOutBy = "hash"

    def reading(self) -> Keywords:
        """Returns how the readers read its files."""
        reading = Keywords(source=self.name)
        if self.kind is not None:
            reading["kind"] = self.kind
        if self.adapter is not None:
            reading["adapter"] = self.adapter
        if self.encoding is not None:
            reading["encoding"] = self.encoding
        return reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The dialogues of a run and how they become rows.

    Attributes:
        sources: where they are.
        template: the chat template's name.
        default_system: its system text; None for the template's own.
        template_date: the date that a tokenizer's own template prints, see `templates.by_name`.
        truncation: what becomes of a dialogue longer than a row.
        trained_turns: which of the assistant's turns are trained.
        row_length: tokens of a row.
        packed: several dialogues a row, or one.
        window: how many dialogues are packed together; None for the epoch.
        held_out: which dialogues are held out.
        duplicates: what is done about dialogues that occur twice.
        cache: folder of the tokenised data; None for one in the run's folder.
        num_threads: threads that make batches; 0 makes each when it is asked for.
        num_processes: processes that tokenise; None for the cores where it pays.
    """

    sources: tuple[SourceConfig, ...]
    template: str = "huatuogpt"
    default_system: str | None = None
    template_date: str | None = None
    truncation: TruncationPolicy = "drop_oldest_turns"
    trained_turns: TrainedTurns = "all"
    row_length: int = 2048
    packed: bool = True
    window: int | None = None
    held_out: HeldOutConfig = HeldOutConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    cache: str | None = operational(None)
    num_threads: int = operational(2)
    num_processes: int | None = operational(None)

    def __post_init__(self) -> None:
        """Raises ValueError where there is nothing to read."""
        if not self.sources:
            raise ValueError("sources is empty: it must name at least one source")

    @property
    def chat_template(self) -> ChatTemplate:
        """The template with its settings."""
        return templates.by_name(
            self.template, default_system=self.default_system, date=self.template_date
        )


@dataclasses.dataclass(frozen=True)
class DialogueData:
    """Rows to train on, rows held out (None where nothing is), and what they follow from.

    Attributes:
        train: endless.
        held_out: one epoch of it is the evaluation.
        prepared: the cache they are read from.
        num_threads: threads that make batches.
        account: what became of all rows; None where the cache was made without one.
    """

    train: RowStream
    held_out: RowStream | None
    prepared: Prepared
    num_threads: int
    account: Account | None

    @property
    def identity(self) -> dict[str, Any]:
        """The cache's name is a hash of the content, the tokenizer, the template and the split."""
        return {"cache": self.prepared.folder.name}

    def evaluation_batches(self, batch_size: int, mesh: Mesh) -> BatchIterator:
        """Returns this host's share of the held-out rows, each once."""
        assert self.held_out is not None
        return evaluation_batches(
            self.held_out, batch_size=batch_size, share=host_share(mesh), prefetch=self.prefetch
        )

    @property
    def prefetch(self) -> PrefetchConfig:
        """Threads that make batches ahead."""
        return PrefetchConfig(num_threads=self.num_threads)


def open_dialogues(
    cfg: DataConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    seed: int,
    default_cache: pathlib.Path,
    progress: Callable[[Progress], None] | None = None,
) -> DialogueData:
    """Tokenises the dialogues, or finds it done.

    Args:
        cfg: which ones.
        tokenizer: the model's.
        seed: of the order and the draw.
        default_cache: where the cache goes unless the config names a folder.
        progress: called while dialogues are tokenised.

    Raises:
        ValueError: an unreadable file, an unknown template, nothing left to train on.
    """
    rows = RowConfig(row_length=cfg.row_length, packed=cfg.packed, window=cfg.window)
    template_tokenizer = TemplateTokenizer(
        template=cfg.chat_template,
        tokenizer=tokenizer,
        max_tokens=cfg.row_length,
        policy=cfg.truncation,
        trained=cfg.trained_turns,
    )
    prepared = prepare(
        [
            DialogueSource(
                name=source.name,
                paths=source.paths,
                reading=source.reading(),
                held_out_by=source.held_out_by,
            )
            for source in cfg.sources
        ],
        template_tokenizer,
        PrepareConfig(
            held_out=cfg.held_out, duplicates=cfg.duplicates, num_processes=cfg.num_processes
        ),
        folder=cfg.cache or default_cache,
        progress=progress,
    )
    shares = [
        SourceShare(
            name=source.name, epochs=source.epochs, weight=source.weight, limit=source.limit
        )
        for source in cfg.sources
        if source.held_out_by != "always"
    ]
    train, held_out = prepared.train, prepared.held_out
    mixture = Mixture(train.source_ids, train.sources, shares, seed=seed)
    return DialogueData(
        train=RowStream(train, rows, mixture=mixture, seed=seed),
        held_out=None if held_out is None else RowStream(held_out, rows, mixture=None),
        prepared=prepared,
        num_threads=cfg.num_threads,
        account=_account(prepared, cfg.sources),
    )


def _account(prepared: Prepared, sources: Sequence[SourceConfig]) -> Account | None:
    """Returns the cache's account, with what the sources' limits set aside."""
    if "account" not in prepared.statistics:
        return None
    account = Account.from_json(prepared.statistics["account"])
    train = prepared.train
    for source in sources:
        if source.limit is not None and source.name in train.sources:
            number = int(np.sum(train.source_ids == train.sources.index(source.name)))
            over = max(0, number - source.limit)
            account.put_aside(f"over the limit of {source.name}", over, used_for=TRAINED_ON)
    return account
