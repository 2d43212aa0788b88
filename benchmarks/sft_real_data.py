"""Fine-tuning on real dialogues from scratch, against an interpolated bigram model.

About 13,000 dialogues of the four kinds, a Llama of 8 million parameters, one machine without an
accelerator. The held-out loss of each kind stands beside that of a bigram model of the same tokens
(Jelinek-Mercer smoothing with weights by context count, fitted by expectation maximisation on
training data it was not counted on; Chen and Goodman 1999).

    HUATUO_SHARED_DATA=DIR python benchmarks/sft_real_data.py --workdir=runs/real

Stopped, it goes on with the same command; `--so_far` gives the figures of an unfinished run.
"""

import json
import pathlib
from typing import Any

import numpy as np
import real_data
from absl import app, flags

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import abstract_params, count_parameters
from huatuo_jax.data.tokenizing import ALL_KINDS, TokenDataset
from huatuo_jax.sft import run_sft
from huatuo_jax.training.metrics import read_rows

_WORKDIR = flags.DEFINE_string("workdir", "runs/real", "The run's folder.")
_STEPS = flags.DEFINE_integer("steps", 2000, "Optimizer steps.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 2, "Rows of a step.", lower_bound=1)
_SO_FAR = flags.DEFINE_bool("so_far", False, "Figures of a run that is not finished, as it stands.")
_OUTPUT = flags.DEFINE_string(
    "output", "benchmarks/results/sft_real_data.json", "File for the figures."
)


def main() -> None:
    """Train, fit the bigram model, compare, write the figures."""
    cfg = real_data.sft_settings(steps=_STEPS.value, batch_size=_BATCH_SIZE.value)
    workdir = pathlib.Path(_WORKDIR.value)
    if not _SO_FAR.value:
        run_sft(cfg, workdir)
    (cache,) = (path for path in (workdir / "data").iterdir() if (path / "index.npz").is_file())
    bigram = bigram_losses(TokenDataset(cache, "train"), TokenDataset(cache, "held_out"))
    figures = figures_of(read_rows(workdir / "sft" / "metrics.jsonl"), bigram)
    print(json.dumps(figures, indent=2))
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def figures_of(rows: list[dict[str, Any]], bigram: dict[str, float]) -> dict[str, Any]:
    """Held-out loss at each evaluation, with the minutes of training before it, and at the last."""
    minutes, evaluations = 0.0, []
    speeds = []
    for row in rows:
        if "throughput/step_s" in row:
            minutes += row["throughput/step_s"] / 60
            speeds.append(row["throughput/tokens_per_s"])
        if "eval/loss" in row:
            evaluations.append((row, minutes))
    last, _ = evaluations[-1]
    return {
        "parameters": count_parameters(abstract_params(real_data.BACKBONE, ComputeConfig())),
        "steps_planned": _STEPS.value,
        "batch_size": _BATCH_SIZE.value,
        "tokens_per_s_median": round(float(np.median(speeds)), 0),
        "evaluations": [
            {"step": row["step"], "minutes": round(spent, 1), "loss": round(row["eval/loss"], 4)}
            for row, spent in evaluations
        ],
        "held_out_tokens": int(last["eval/trained_tokens"]),
        "held_out_at_last": {
            kind: {
                "loss": round(last[f"eval/loss{suffix}"], 4),
                "token_accuracy": round(last[f"eval/token_accuracy{suffix}"], 4),
                "bigram_loss": round(bigram[kind], 4),
            }
            for kind, suffix in [("all", ""), *((kind, f"/{kind}") for kind in real_data.SOURCES)]
        },
    }


def bigram_losses(train: TokenDataset, held_out: TokenDataset) -> dict[str, float]:
    """Mean loss of the held-out trained tokens under the bigram model, for all and by kind."""
    pairs, _ = token_pairs(train)
    is_fitted = np.arange(len(pairs)) % 10 == 0
    weights = Bigram(pairs[~is_fitted]).fit_weights(pairs[is_fitted])
    test, kinds = token_pairs(held_out)
    losses = -np.log(Bigram(pairs).probabilities(test, weights))
    by_kind = {
        kind: float(losses[kinds == index].mean())
        for index, kind in enumerate(ALL_KINDS)
        if (kinds == index).any()
    }
    return {"all": float(losses.mean()), **by_kind}


def token_pairs(dataset: TokenDataset) -> tuple[np.ndarray, np.ndarray]:
    """Every trained token with the token before it, `[n, 2]`, and the kind of its dialogue."""
    pairs, kinds = [], []
    for index in range(len(dataset)):
        example = dataset[index]
        ids, wanted = np.asarray(example.token_ids), np.asarray(example.trained_mask)[1:]
        pairs.append(np.stack([ids[:-1][wanted], ids[1:][wanted]], axis=1))
        kinds.append(np.full(len(pairs[-1]), dataset.kind_ids[index]))
    return np.concatenate(pairs).astype(np.int64), np.concatenate(kinds)


class Bigram:
    """Counts, and the three distributions that are interpolated: bigram, unigram, uniform."""

    vocab_size = real_data.BACKBONE.vocab_size
    num_buckets = 16  # of contexts, by the logarithm of their count

    def __init__(self, pairs: np.ndarray) -> None:
        """Count pairs of context and token, `[n, 2]`."""
        self.keys, self.counts = np.unique(
            pairs[:, 0] * self.vocab_size + pairs[:, 1], return_counts=True
        )
        self.contexts = np.bincount(pairs[:, 0], minlength=self.vocab_size)
        self.tokens = np.bincount(pairs[:, 1], minlength=self.vocab_size)

    def components(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each token's probability under the three, `[n, 3]`, and its context's bucket."""
        keys = pairs[:, 0] * self.vocab_size + pairs[:, 1]
        place = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        found = np.where(self.keys[place] == keys, self.counts[place], 0)
        context = self.contexts[pairs[:, 0]]
        bigram = found / np.maximum(context, 1)
        unigram = self.tokens[pairs[:, 1]] / self.tokens.sum()
        uniform = np.full(len(pairs), 1 / self.vocab_size)
        bucket = np.log2(context + 1).astype(int).clip(max=self.num_buckets - 1)
        return np.stack([bigram, unigram, uniform], axis=1), bucket

    def fit_weights(self, pairs: np.ndarray, num_rounds: int = 50) -> np.ndarray:
        """Weights of the three for each bucket, by expectation maximisation on other pairs."""
        parts, bucket = self.components(pairs)
        weights = np.full((self.num_buckets, 3), 1 / 3)
        for _ in range(num_rounds):
            shares = parts * weights[bucket]
            shares /= shares.sum(axis=1, keepdims=True)
            totals = np.stack(
                [np.bincount(bucket, shares[:, i], self.num_buckets) for i in range(3)], axis=1
            )
            weights = (totals + 1e-3) / (totals + 1e-3).sum(axis=1, keepdims=True)
        return weights

    def probabilities(self, pairs: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The interpolated probability of each token."""
        parts, bucket = self.components(pairs)
        return (parts * weights[bucket]).sum(axis=1)


if __name__ == "__main__":
    app.run(lambda _: main())
