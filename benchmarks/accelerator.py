"""What one GPU or TPU chip makes of the project's own programs, as shares of what it could do.

| part        | what is timed                                     | as a share of             |
|-------------|---------------------------------------------------|---------------------------|
| `sft`       | optimizer steps on packed rows of random tokens   | the peak in bfloat16      |
| `decode`    | rounds of an engine whose slots are all taken     | the bandwidth of a copy   |
| `attention` | both passes of the kernel that `auto` takes       | the XLA kernel's time     |

The share of the peak is model-FLOPs utilisation (`throughput.py` has the formula and the peaks). A
step of decoding has to read each weight once, and the keys and values of all tokens so far; their
bytes over the time, over the bandwidth of `x + 1` on a large array, are the other share. Attention
is held against float32 on the XLA kernel as well: the largest difference, as a share of the largest
output or gradient.

Models are random, computed in bfloat16: `1b` is Llama 3.2 1B, trained whole, with float32 weights
and AdamW; `7b` is LLaMA 7B, trained by adapters. Each part of each runs in a process of its own, as
its peak of memory is that of a process.

    python benchmarks/accelerator.py --sizes=1b,7b

Figures are written after each part. Exit code 1 says that one failed; the others' are kept.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from huatuo_jax.backbone.attention import attend, choose_kernel
from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig, Kernel, Remat, preset
from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.core import sharding
from huatuo_jax.core.files import write_file
from huatuo_jax.data.batches import pack_row
from huatuo_jax.data.tokenizing import UNKNOWN_KIND, Example
from huatuo_jax.generation import cache as caches
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.requests import Request, SamplingConfig
from huatuo_jax.sft import SftConfig, sft_step
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig, open_model
from huatuo_jax.training.metrics import ModelFlops, peak_flops
from huatuo_jax.training.optimizer import OptimizerConfig

_SIZES = flags.DEFINE_list("sizes", ["1b", "7b"], "Models: 1b, 7b; tiny tries the script.")
_PARTS = flags.DEFINE_list("parts", ["sft", "decode", "attention"], "What is measured.")
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens of a row, or of prompt and answer.")
_ROWS = flags.DEFINE_integer("rows", 8, "Rows of an optimizer step.", lower_bound=1)
_ROWS_AT_ONCE = flags.DEFINE_integer("rows_at_once", 4, "Of them, at once.", lower_bound=1)
_REMAT = flags.DEFINE_enum("remat", "full", [*get_args(Remat)], "See ComputeConfig.")
_SLOTS = flags.DEFINE_integer("slots", 16, "Answers decoded at once.", lower_bound=1)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Where to; by default benchmarks/results/accelerator_DEVICE.json."
)
_ONE = flags.DEFINE_string("one", None, "Measure this PART/SIZE in this process, print JSON.")

Figures = dict[str, Any]

FOLDER = pathlib.Path(__file__).resolve().parent
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "libtpu")
SEGMENTS_OF_A_ROW = 4
COPIED_BYTES = 2**30
LORA = LoraConfig(rank=64, alpha=128.0)
TINY = dataclasses.replace(
    preset("llama_7b"),
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
MODELS: dict[str, tuple[BackboneConfig, LoraConfig | None]] = {
    "1b": (preset("llama3.2_1b"), None),
    "7b": (preset("llama_7b"), LORA),
    "tiny": (TINY, dataclasses.replace(LORA, rank=2)),
}


def main(_: list[str]) -> None:
    """Measures all parts of all sizes, one after another, and writes what came of it."""
    if _ONE.value is not None:
        part, size = _ONE.value.split("/")
        print(json.dumps(MEASURES[part](size)))
        return
    wanted = [(part, size) for size in _SIZES.value for part in _PARTS.value]
    known = {(part, size) for part in MEASURES for size in MODELS}
    if unknown := ["/".join(one) for one in wanted if one not in known]:
        raise app.UsageError(f"{', '.join(unknown)}: parts are {[*MEASURES]}, sizes {[*MODELS]}")
    if _OUTPUT.value is not None:
        pathlib.Path(_OUTPUT.value).parent.mkdir(parents=True, exist_ok=True)
    found: Figures = {}
    for one in map("/".join, wanted):
        print(f"{one} ...", flush=True)
        found[one] = _in_a_process(one)
        print(f"  {_line(found[one])}", flush=True)
        _write(found)
    sys.exit(any("failed" in one for one in found.values()))


def measure_sft(size: str) -> Figures:
    """Optimizer steps as `sft.py` runs them, on rows that are already on the device."""
    cfg = _sft_config(size)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = open_model(cfg.model, cfg.compute.compute_config())
    step = sft_step(cfg, model, mesh, num_steps=1000)
    state = model.make_state(jax.random.key(0), step.optimizer, mesh)
    rows = [_random_row(seed, model.cfg.vocab_size) for seed in range(cfg.batch_size)]
    batch = sharding.put_whole(
        {name: np.stack([row[name] for row in rows]) for name in rows[0]}, mesh
    )
    seconds, metrics = [], {}
    for number in range(-2, _REPEATS.value):  # The first compiles, the next finds it compiled.
        started_s = time.perf_counter()
        state, metrics = jax.block_until_ready(step.update(state, batch))
        if number >= 0:
            seconds.append(time.perf_counter() - started_s)
    flops = ModelFlops.of(model.cfg, adapters_only=cfg.model.lora is not None).of_step(
        tokens=float(metrics["tokens"]),
        scored_tokens=float(metrics["num_terms"]),
        attended_pairs=float(metrics["attended_pairs"]),
    )
    middle_s, peak = statistics.median(seconds), peak_flops(jax.devices()[0])
    return _device() | {
        "trained": "all weights" if cfg.model.lora is None else f"LoRA, rank {cfg.model.lora.rank}",
        "rows": cfg.batch_size,
        "rows_at_once": cfg.rows_at_once,
        "length": cfg.data.row_length,
        "remat": cfg.compute.remat,
        "loss": float(metrics["loss"] / metrics["num_terms"]),
        "seconds_a_step": middle_s,
        "tokens_per_s": float(metrics["tokens"]) / middle_s,
        "model_flops_a_step": flops,
        "model_flops_utilisation": None if peak is None else flops / middle_s / peak,
        "peak_memory_bytes": _peak_bytes(),
    }


def measure_decode(size: str) -> Figures:
    """Rounds of a full engine, from the end of the prompts to that of the answers."""
    backbone, _ = MODELS[size]
    copied = copy_bandwidth()
    compute = ComputeConfig(param_dtype="bfloat16", compute_dtype="bfloat16")
    params = jax.jit(lambda key: init_params(key, backbone, compute, head="lm"))(jax.random.key(0))
    slots, prompt = _SLOTS.value, _LENGTH.value // 2
    engine = Engine(
        Transformer(backbone, compute), {"params": params}, slots=slots, max_length=_LENGTH.value
    )
    answer = _LENGTH.value - prompt - 1
    _run_rounds(engine, prompt, answer, backbone.vocab_size)  # Compiles each size of the cache.
    tokens, seconds = _run_rounds(engine, prompt, answer, backbone.vocab_size)
    steps = tokens / slots
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not backbone.tie_embeddings:  # Then a step reads a row of the table for each token.
        weights -= params["embedding"]["table"].nbytes
    positions = slots * (prompt + answer - steps / 2)  # On average over the steps.
    read = weights + caches.num_bytes(backbone, positions=round(positions), dtype=jnp.bfloat16)
    return _device() | {
        "slots": slots,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "tokens_per_s": tokens / seconds,
        "seconds_a_step": seconds / steps,
        "bytes_a_step": read,
        "bytes_per_s": read * steps / seconds,
        "copy_bytes_per_s": copied,
        "share_of_copy_bandwidth": read * steps / seconds / copied,
        "peak_memory_bytes": _peak_bytes(),
    }


def measure_attention(size: str) -> Figures:
    """The kernel that `auto` takes beside the XLA one, on rows of several segments."""
    backbone, _ = MODELS[size]
    length, kv_heads = _LENGTH.value, backbone.num_kv_heads
    shapes = [
        (_ROWS_AT_ONCE.value, length, heads, backbone.head_dim)
        for heads in (backbone.num_heads, kv_heads, kv_heads, backbone.num_heads)
    ]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    wide = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    narrow = [array.astype(jnp.bfloat16) for array in wide]
    common = {"segment_ids_BT": jnp.broadcast_to(_segments(length), shapes[0][:2])}
    own = choose_kernel(
        "auto",
        jax.default_backend(),
        length=length,
        head_dim=backbone.head_dim,
        dtype="bfloat16",
        alibi=False,
    )
    with jax.default_matmul_precision("highest"):
        exact = _attention("xla", common)(*(array.astype(jnp.float32) for array in narrow))
    found: Figures = {"kernel": own, "rows": shapes[0][0], "length": length}
    for name, kernel in (("own", own), ("xla", "xla")):
        function = _attention(kernel, common)
        results = function(*narrow)
        found[f"{name}_seconds"] = _seconds_of(lambda function=function: function(*narrow))
        found[f"{name}_largest_difference"] = [
            float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
            for a, b in zip(results, exact, strict=True)
        ]
    return _device() | found | {"speedup": found["xla_seconds"] / found["own_seconds"]}


MEASURES: dict[str, Callable[[str], Figures]] = {
    "sft": measure_sft,
    "decode": measure_decode,
    "attention": measure_attention,
}


def copy_bandwidth() -> float:
    """Bytes read and written in a second while a large array is made of another."""
    array = jnp.zeros(COPIED_BYTES // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * array.nbytes / _seconds_of(lambda: add(array))


def _sft_config(size: str) -> SftConfig:
    backbone, lora = MODELS[size]
    return SftConfig(
        model=ModelConfig(backbone=backbone, tokenizer="none", lora=lora),
        data=DataConfig(
            sources=(SourceConfig(name="random", paths=("none",)),), row_length=_LENGTH.value
        ),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        batch_size=_ROWS.value,
        micro_batch_size=_ROWS_AT_ONCE.value,
        compute=ComputeSection(compute_dtype="bfloat16", remat=_REMAT.value),
    )


def _random_row(seed: int, vocab_size: int) -> dict[str, np.ndarray]:
    """A full row of examples of random lengths and tokens, of which the second half is trained."""
    generator, length = np.random.default_rng(seed), _LENGTH.value
    cuts = np.sort(generator.choice(np.arange(2, length - 2), SEGMENTS_OF_A_ROW - 1, replace=False))
    examples = []
    for size in np.diff(np.concatenate([[0], cuts, [length]])):
        is_trained = np.arange(size) >= size // 2
        tokens = generator.integers(0, vocab_size, size)
        examples.append(Example(tokens.astype(np.int32), is_trained, UNKNOWN_KIND, "random"))
    return pack_row(examples, row_length=length, pad_token_id=0)


def _segments(length: int) -> jax.Array:
    """Numbers `[T]` of a row of equal segments."""
    index = np.arange(length)
    size = length // SEGMENTS_OF_A_ROW
    return jnp.asarray(index // size + 1, jnp.int32)


def _run_rounds(engine: Engine, prompt: int, answer: int, vocab_size: int) -> tuple[int, float]:
    """Tokens, and seconds, of the rounds after the one that all prompts are run in."""
    generator = np.random.default_rng(0)
    for seed in range(_SLOTS.value):
        tokens = generator.integers(0, vocab_size, prompt).tolist()
        sampling = SamplingConfig(max_new_tokens=answer)
        engine.submit(Request(prompt_token_ids=tokens, sampling=sampling, seed=seed))
    engine.reset_report()
    while engine.report.prompt_tokens < _SLOTS.value * prompt:
        engine.step()
    engine.reset_report()
    while engine.busy:
        engine.step()
    return engine.report.generated_tokens, engine.report.seconds


def _attention(kernel: Kernel, common: dict[str, jax.Array]) -> Callable[..., Any]:
    """Output and the three gradients of attention, for queries, keys, values and a cotangent."""

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
        function = functools.partial(
            attend,
            **common,
            sliding_window=None,
            alibi_slopes_N=None,
            kernel=kernel,
            query_chunk=256,
        )
        output, backward = jax.vjp(function, q, k, v)
        return output, *backward(cotangent)

    return run


def _seconds_of(call: Callable[[], Any]) -> float:
    """Of one call, of several that follow each other."""
    jax.block_until_ready(call())
    started_s = time.perf_counter()
    for _ in range(_REPEATS.value):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - started_s) / _REPEATS.value


def _in_a_process(one: str) -> Figures:
    """What a process of its own prints last; its messages go where ours do."""
    done = subprocess.run(
        [sys.executable, __file__, *_flags(), f"--one={one}"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        return {"failed": f"exit code {done.returncode}; its messages are above"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _flags() -> list[str]:
    shared = (_REPEATS, _LENGTH, _ROWS, _ROWS_AT_ONCE, _REMAT, _SLOTS)
    return [f"--{flag.name}={flag.value}" for flag in shared]


def _line(figures: Figures) -> str:
    shown = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()]
    return ", ".join(shown)


def _device() -> Figures:
    return {"device": jax.devices()[0].device_kind}


def _peak_bytes() -> int | None:
    statistics_ = jax.devices()[0].memory_stats()
    return None if statistics_ is None else statistics_.get("peak_bytes_in_use")


def _write(found: Figures) -> None:
    """All figures so far, once there are any: the device they are of names the file."""
    devices = [one["device"] for one in found.values() if "device" in one]
    if not devices:
        return
    slug = "_".join(devices[0].lower().split())
    path = pathlib.Path(_OUTPUT.value or FOLDER / "results" / f"accelerator_{slug}.json")
    write_file(path, json.dumps(_heading() | found, indent=2) + "\n")
    print(f"  written: {path}", flush=True)


def _heading() -> Figures:
    installed = {one.name: one.version for one in importlib.metadata.distributions()}
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }


if __name__ == "__main__":
    app.run(main)
