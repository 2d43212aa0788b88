"""A tiny model, batches in memory, and a short run of them: what the tests of training share."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.core import sharding
from huatuo_jax.core.files import as_path
from huatuo_jax.data.tokenizing import ALL_KINDS
from huatuo_jax.sft import evaluation_numbers, report_step, token_loss
from huatuo_jax.training.loop import Job, LoopConfig, make_measure, train
from huatuo_jax.training.metrics import ModelFlops
from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer
from huatuo_jax.training.run_directory import begin_stage, run_lock
from huatuo_jax.training.update import (
    abstract,
    compile_update,
    make_sharded,
    make_update,
    new_state,
)
from tests.tiny import backbone

# A vocabulary that is not a multiple of 8: the padded rows are part of every test.
TINY = backbone(
    vocab_size=93,
    vocab_multiple=16,
    intermediate_size=48,
    num_heads=4,
    head_dim=8,
    max_positions=64,
    initializer_range=0.2,
)


def dialogues(lengths, *, seed=0, vocab_size=TINY.vocab_size):
    """Invented dialogues: a prompt, an answer that is trained, of a kind in turn."""
    draw = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        trained = np.zeros(length, bool)
        trained[int(draw.integers(1, length)) :] = True
        ids = draw.integers(0, vocab_size, length)
        made.append((ids, trained, number % len(ALL_KINDS)))
    return made


def rows_of(groups, *, row_length):
    """One row for each group of dialogues, as `huatuo_jax.data.batches` lays them out."""
    shape = (len(groups), row_length)
    names = ("token_ids", "segment_ids", "positions", "kind_ids")
    batch = {name: np.zeros(shape, np.int32) for name in names}
    batch["trained_mask"] = np.zeros(shape, bool)
    for row, group in enumerate(groups):
        start = 0
        for segment, (ids, trained, kind) in enumerate(group, start=1):
            place = (row, slice(start, start + len(ids)))
            batch["token_ids"][place] = ids
            batch["segment_ids"][place] = segment
            batch["positions"][place] = np.arange(len(ids))
            batch["trained_mask"][place] = trained
            batch["trained_mask"][row, start] = False
            batch["kind_ids"][place] = kind
            start += len(ids)
    return batch


def random_batch(seed, *, rows=8, row_length=24):
    """Rows of two or three dialogues and some padding."""
    draw = np.random.default_rng(seed)
    groups = []
    for row in range(rows):
        lengths = draw.integers(4, row_length // 3 + 1, 3)[: 2 + row % 2]
        groups.append(dialogues(lengths, seed=seed * 1000 + row))
    return rows_of(groups, row_length=row_length)


class EndlessBatches:
    """Batch n is made from the seed n; the position is one number."""

    def __init__(self, *, seconds_each=0.0, spoilt=(), failing_at=None):
        self._next, self._seconds_each, self._spoilt = 0, seconds_each, spoilt
        self._failing_at = failing_at

    def __next__(self):
        time.sleep(self._seconds_each)
        if self._next == self._failing_at:
            raise ZeroDivisionError("as the test wants")
        batch = random_batch(self._next)
        if self._next in self._spoilt:
            batch["token_ids"][0, 0] = -1  # An unknown id: the model answers NaN.
        self._next += 1
        return batch

    def get_state(self):
        return {"next": self._next}

    def set_state(self, state):
        self._next = state["next"]


def tiny_job(
    workdir,
    *,
    mesh,
    num_steps=12,
    num_micro_batches=2,
    seconds_each=0.0,
    spoilt=(),
    failing_at=None,
    learning_rate=1e-2,
    compute=None,
):
    """A whole stage on the tiny model."""
    compute = compute or ComputeConfig()
    optimizer_config = OptimizerConfig(learning_rate=learning_rate, warmup_steps=2)
    optimizer = make_optimizer(optimizer_config, num_steps=num_steps)
    loss = functools.partial(token_loss, Transformer(TINY, compute), chunk=8)

    def make(key):
        variables = {"params": init_params(key, TINY, compute)}
        return new_state(variables, is_trained=lambda path: True, optimizer=optimizer, key=key)

    decisive = {"num_steps": num_steps, "learning_rate": learning_rate}
    key = jax.random.key(3)
    state = abstract(make, mesh, key)
    held_out = [random_batch(10_000 + n) for n in range(2)]
    measure = make_measure(
        lambda variables, batch: loss(variables, batch).others,
        lambda: held_out,
        evaluation_numbers,
        mesh,
    )
    return Job(
        directory=begin_stage(workdir, "sft", settings=decisive, decisive=decisive),
        decisive=decisive,
        num_steps=num_steps,
        mesh=mesh,
        make_state=lambda: make_sharded(make, mesh, key),
        abstract_state=state,
        update=compile_update(
            make_update(loss, optimizer, num_micro_batches=num_micro_batches), state, mesh
        ),
        batches=EndlessBatches(seconds_each=seconds_each, spoilt=spoilt, failing_at=failing_at),
        report=functools.partial(report_step, flops=ModelFlops.of(TINY)),
        evaluate=lambda state: measure(state.variables),
        row_names=lambda position: [f"dialogue-{position['next']}-{row}" for row in range(8)],
    )


def run_tiny(workdir, *, loop=None, mesh=None, **job):
    """Trains it to its end and gives the last state as numpy arrays by path."""
    mesh = mesh or sharding.make_mesh(fsdp=1, devices=jax.devices()[:1])
    loop = loop or LoopConfig(evaluate_every=4, checkpoint_every=3, tensorboard=False)
    with run_lock(workdir):
        state, _ = train(tiny_job(as_path(workdir), mesh=mesh, **job), loop)
    return arrays_of(state)


def arrays_of(state):
    """The leaves of a state by path, as numpy arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        sharding.path_name(path): np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        for path, leaf in leaves
    }
