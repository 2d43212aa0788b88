"""Reward training beside TRL's RewardTrainer: pairs per second and memory, in one run.

Each contender trains the same Llama with a score head on the same pairs with the same AdamW in
float32, in a process of its own, on the same cores: ours on packed rows, TRL as it comes (padded,
gradient checkpointing) and without checkpointing. A step's pairs are those of one packed batch of
ours; TRL takes as many a step on average. They take turns, and figures are medians over the turns.
Their losses on the first batch have to agree.

Pairs are real ones where the folder of real data is (beside the checkout, or where
HUATUO_SHARED_DATA says), else made of the project's own samples.

    python benchmarks/reward.py --sizes=10m --steps=6 --rounds=3
"""

import json
import pathlib
import statistics
import tempfile
from collections.abc import Sequence

import contenders
import contest
import jax
import numpy as np
import real_data
import reward_contenders
from absl import app, flags

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import count_parameters, init_params
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.hf.export import export_model
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource, Group, open_comparisons
from huatuo_jax.preferences.rows import ComparisonRows, RowsConfig

_SIZES = flags.DEFINE_list("sizes", ["10m"], "Models: 50m, 10m, tiny.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 512, "Tokens of a prompt and answer at most.")
_ROW_LENGTH = flags.DEFINE_integer("row_length", 1024, "Ours: tokens of a packed row.")
_CONTENDERS = flags.DEFINE_list(
    "contenders", [*reward_contenders.CONTENDERS], "Who takes part; `ours` always does."
)
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/reward_cpu.json", "Where to.")

SAMPLE = contest.ROOT / "huatuo_jax" / "data" / "sample"
REAL_PAIRS = ("medicalgpt_reward_test.json", "medicalgpt_dpo_zh_500.jsonl")
OPTIMIZER = {"learning_rate": 1e-5, "weight_decay": 0.0, **contest.ADAMW}
SEED = 0


def main(_: list[str]) -> None:
    """Measures every size, prints tables, writes the result."""
    contest.check_names(_SIZES.value, _CONTENDERS.value, reward_contenders.CONTENDERS)
    name, groups, tokenizer = read_all()
    contest.hold(
        _SIZES.value,
        pathlib.Path(_OUTPUT.value),
        name,
        lambda size: measure(size, groups, tokenizer),
        print_table,
    )


def read_all() -> tuple[str, Sequence[Group], pathlib.Path]:
    """The pairs, what they are called, and their tokenizer's folder."""
    if (real_data.SHARED_DATA / "MANIFEST.json").is_file():
        name = "real pairs: 4_preference"
        tokenizer = real_data.SHARED_DATA / "tokenizers" / "minimind_6400"
        paths = tuple(str(real_data.SHARED_DATA / "4_preference" / one) for one in REAL_PAIRS)
        source, template = ComparisonSource(paths=paths), "chatml"
    else:
        name, tokenizer = "pairs made of the project's sample dialogues", SAMPLE / "tokenizer"
        paths = tuple(str(path) for path in sorted(SAMPLE.glob("*_instruction.jsonl")))
        source, template = ComparisonSource(paths=paths, reads="dialogues"), "huatuogpt"
    cfg = ComparisonsConfig(
        sources=(source,),
        template=template,
        truncation="drop_row",
        max_length=_MAX_LENGTH.value,
        max_left_out_share=1.0,
        row_length=_ROW_LENGTH.value,
        held_out=HeldOutConfig(share=0.0),
    )
    return name, open_comparisons(cfg, load_tokenizer(tokenizer)).train, tokenizer


def packed_batches(
    groups: Sequence[Group], num_steps: int
) -> tuple[dict[str, np.ndarray], list[list[dict[str, list[int]]]]]:
    """The first batches of an epoch as our pipeline packs them, and the pairs of each.

    Raises:
        ValueError: there are not enough pairs.
    """
    rows = ComparisonRows(groups, RowsConfig(row_length=_ROW_LENGTH.value, seed=SEED))
    num_rows = num_steps * contest.BATCH_SIZE.value
    if num_rows > rows.first_row(1):
        raise ValueError(
            f"{num_steps} steps of {contest.BATCH_SIZE.value} rows are more than the "
            f"{rows.first_row(1)} rows there are; take fewer --steps"
        )
    places = rows.most_pairs(num_rows)
    read = [rows.read(row, num_pairs=places) for row in range(num_rows)]
    stacked = {name: np.stack([row[name] for row in read]) for name in read[0]}
    shape = (num_steps, contest.BATCH_SIZE.value)
    batches = {name: array.reshape(*shape, *array.shape[1:]) for name, array in stacked.items()}
    pairs: list[list[dict[str, list[int]]]] = [[] for _ in range(num_steps)]
    for row in range(num_rows):
        for part in rows.parts_in(row):
            pairs[row // contest.BATCH_SIZE.value] += [
                {
                    "chosen_ids": part.answers[pair.chosen].token_ids.tolist(),
                    "rejected_ids": part.answers[pair.rejected].token_ids.tolist(),
                }
                for pair in part.pairs
            ]
    # TRL knows hard labels only, so ours trains on the same.
    batches["p_chosen"] = np.ones_like(batches["p_chosen"])
    return batches, pairs


def measure(size: str, groups: Sequence[Group], tokenizer: pathlib.Path) -> contest.Result:
    """All contenders on one model."""
    # One id more than the tokenizer's, so that an id to pad with is free.
    vocab_size = len(load_tokenizer(tokenizer)) + 1
    cfg = contenders.backbone(size, vocab_size=vocab_size, max_positions=_MAX_LENGTH.value)
    params = init_params(jax.random.key(SEED), cfg, ComputeConfig(), head="score")
    num_steps = contest.WARMUP.value + contest.STEPS.value
    batches, pairs = packed_batches(groups, num_steps)
    settings = contest.settings(
        OPTIMIZER,
        row_length=_ROW_LENGTH.value,
        max_length=_MAX_LENGTH.value,
        pairs_per_step=round(statistics.mean(map(len, pairs))),
    )
    names = dict.fromkeys(["ours", *_CONTENDERS.value])
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        export_model(params, cfg, folder / "model", head="score", source_folder=tokenizer)
        np.savez(folder / "batches.npz", **batches)
        (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        turns = contest.take_turns(size, "reward_contenders.py", folder, names)
    return {
        "parameters": count_parameters(params),
        "backbone": cfg.to_dict(),
        "settings": settings,
        "packing_efficiency": float((batches["segment_ids"] > 0).mean()),
        "contenders": {
            one: contest.figures(turns[one], turns["ours"], unit="pairs") for one in names
        },
    }


def print_table(size: str, result: contest.Result) -> None:
    """What was trained on, then one line a contender."""
    print(
        f"\n{size}: {result['parameters'] / 1e6:.1f}M parameters, rows packed to "
        f"{result['packing_efficiency']:.1%}, {result['settings']['pairs_per_step']} pairs a step"
    )
    columns = {"pairs/s": ("pairs_per_second", ".2f"), **contest.COLUMNS}
    contest.print_rows(columns, result["contenders"])


if __name__ == "__main__":
    app.run(main)
