"""Turns rollout log-probs, rewards and values into advantages and value targets; packs minibatches.

Prompts and answers differ much in length. A packed row has room for several of the longest possible
ones, where those are short, and holds as many others as fit: each a segment of its own, with
positions from 0, as in `data.batches`. Rows come in few numbers and widths, as each shape is
compiled.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from huatuo_jax.core.sharding import batch_shards
from huatuo_jax.data.batches import best_fit_rows
from huatuo_jax.generation.buckets import bucket_of, ladder
from huatuo_jax.ppo.advantages import (
    Estimates,
    Moments,
    combine,
    gae,
    group_means,
    grpo_advantages,
    have_variance,
    importance_weights,
    moments,
    reinforce_advantages,
    rloo_advantages,
    whiten,
)
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.metrics import (
    distinct_numbers,
    distinct_sums,
    rollout_numbers,
    rollout_sums,
    value_numbers,
    value_sums,
)
from huatuo_jax.ppo.rewards import have_ended, next_kl_coef, normalised_scores, token_rewards
from huatuo_jax.training.losses import last_tokens, masked, over_tokens, sum_by_answer
from huatuo_jax.training.metrics import ratio
from huatuo_jax.training.scoring import Normalization

Rows = dict[str, npt.NDArray[Any]]
Numbers = npt.NDArray[np.int64]
_DISTINCT = (1, 2)
_WIDEST = 1024  # Tokens of a row of several longest answers; some kernels compute all of its pairs.
_WIDTHS = 128  # Widths between are in steps of it, which every attention kernel takes.
_WORTH_COMPILING = 0.2  # The share of slots that another width of short rows has to save.
_SHARES = {
    "sampler_ratio": "tokens",
    "sampler_ratio_capped": "tokens",
    "score_clipped": "rewarded",
    "groups_without_variance": "groups",
}
"""Sums that are there by the config, and what each is divided by."""


class Experience(NamedTuple):
    """A rollout as the models see it.

    Attributes:
        token_ids_NT: prompts and answers.
        mask_NT: the answers' tokens.
        old_log_probs_NT: of the policy that sampled, by the training program.
        reference_log_probs_NT: of the reference.
        sampler_log_probs_NT: as the sampler computed them.
        raw_scores_N: of the scorer.
        values_NT: the critic's, before each token; zero without one.
        values_after_NT: the critic's, after each token.
        has_reward_N: bool, answers whose raw score is one; the others' advantages are 0 and they
            are in no mean of rewards. None for all.
    """

    token_ids_NT: Any
    mask_NT: Any
    old_log_probs_NT: Any
    reference_log_probs_NT: Any
    sampler_log_probs_NT: Any
    raw_scores_N: Any
    values_NT: Any
    values_after_NT: Any
    has_reward_N: Any = None


class Targets(NamedTuple):
    """Advantages and value targets of an update, and the sums of its rollout.

    Attributes:
        advantages_NT: as the policy's loss takes them.
        returns_NT: the critic's targets.
        scores_N: scaled, clipped, truncation dealt with.
        kl_N: k1 of each answer, in nats.
        sums: for metrics.
        kl_coef: for the next rollout.
        running: moments of all raw scores, this rollout's among them.
    """

    advantages_NT: Any
    returns_NT: Any
    scores_N: Any
    kl_N: Any
    sums: Mapping[str, Any]
    kl_coef: jax.Array
    running: Moments


MakeTargets = Callable[[Experience, jax.Array, Moments], Targets]


def compile_targets(
    cfg: PpoConfig,
    *,
    stop_token_ids: tuple[int, ...],
    normalization: Normalization | None,
    mesh: Mesh | None = None,
) -> MakeTargets:
    """Compiles `make_targets` with its settings, under one `jax.jit`.

    Args:
        cfg: see `make_targets`.
        stop_token_ids: see `make_targets`.
        normalization: see `make_targets`.
        mesh: where coefficient and moments lie; all targets will lie on each of its devices.
    """
    return jax.jit(
        functools.partial(
            make_targets, cfg=cfg, stop_token_ids=stop_token_ids, normalization=normalization
        ),
        out_shardings=None if mesh is None else jax.NamedSharding(mesh, jax.P()),
    )


def make_targets(
    experience: Experience,
    kl_coef: jax.Array,
    running: Moments,
    *,
    cfg: PpoConfig,
    stop_token_ids: tuple[int, ...],
    normalization: Normalization | None,
) -> Targets:
    """Turns rollout log-probs, rewards and values into advantages and value targets.

    Args:
        experience: the rollout.
        kl_coef: of this rollout.
        running: moments of all raw scores before it.
        cfg: which estimator, and its settings.
        stop_token_ids: those that generation stops at.
        normalization: of the reward model, where `cfg.score.scale` is `stored`.
    """
    mask_NT, scores_N = experience.mask_NT, experience.raw_scores_N
    ended_N = have_ended(experience.token_ids_NT, mask_NT, stop_token_ids=stop_token_ids)
    has_reward_N = _all_or(experience.has_reward_N, ended_N)
    scores_N = masked(scores_N, has_reward_N)
    seen = combine(running, moments(scores_N, has_reward_N))
    # Numbers that are not finite skip this update; they are not to spoil all later ones.
    running = _keep_finite(seen, running)
    scaled_N = _scaled(scores_N, cfg, running, normalization)
    answer_scores_N = cfg.score.rewards(scaled_N, ended_N)
    rewards_NT = token_rewards(
        answer_scores_N,
        experience.old_log_probs_NT,
        experience.reference_log_probs_NT,
        mask_NT,
        kl_coef=kl_coef if cfg.kl_in == "reward" else 0.0,
    )
    rewarded_NT = mask_NT & has_reward_N[:, None]
    rewards_NT = masked(rewards_NT, rewarded_NT)
    if cfg.score.whiten:
        statistics = moments(rewards_NT, rewarded_NT)
        rewards_NT = whiten(rewards_NT, rewarded_NT, statistics, shift_mean=False)
    estimates = _estimates(rewards_NT, rewarded_NT, ended_N, experience, cfg)
    advantages_NT = estimates.advantages_BT
    weights: dict[str, jax.Array] = {}
    if cfg.sampler_ratio_cap is not None:
        weights_NT = importance_weights(
            experience.old_log_probs_NT,
            experience.sampler_log_probs_NT,
            mask_NT,
            cap=cfg.sampler_ratio_cap,
        )
        advantages_NT = advantages_NT * weights_NT
        is_capped_NT = mask_NT & (weights_NT >= cfg.sampler_ratio_cap)
        weights = {"sampler_ratio": weights_NT.sum(), "sampler_ratio_capped": is_capped_NT.sum()}
    sums = weights | rollout_sums(
        experience.old_log_probs_NT,
        experience.reference_log_probs_NT,
        experience.sampler_log_probs_NT,
        scores_N,
        ended_N,
        mask_NT,
        has_reward_N,
    )
    for n in _distinct(mask_NT.shape[1]):
        sums |= distinct_sums(experience.token_ids_NT, mask_NT, n=n)
    sums |= {
        "reward": rewards_NT.sum(),
        "answer_score": masked(answer_scores_N, has_reward_N).sum(),
    }
    if cfg.score.clip is not None:
        is_clipped_N = has_reward_N & (jnp.abs(scaled_N) > cfg.score.clip)
        sums |= {"score_clipped": is_clipped_N.sum()}
    if cfg.rollout.answers_per_prompt > 1:
        groups = scores_N.reshape(-1, cfg.rollout.answers_per_prompt)
        varied_P = have_variance(groups, applies_BG=has_reward_N.reshape(groups.shape))
        sums |= {"groups": jnp.asarray(varied_P.size), "groups_without_variance": (~varied_P).sum()}
    if cfg.has_critic:
        clipped_NT = jnp.zeros_like(mask_NT)
        known = value_sums(
            experience.values_NT, estimates.returns_BT, mask_NT, clipped_BT=clipped_NT
        )
        sums |= {f"critic/{name}": value for name, value in known.items()}
    differences_NT = experience.old_log_probs_NT - experience.reference_log_probs_NT
    next_coef = next_kl_coef(
        kl_coef,
        sums["kl_k1"] / sums["answers"],
        target_kl_per_sequence=cfg.target_kl_per_sequence,
        gain=cfg.kl_gain,
    )
    return Targets(
        advantages_NT=advantages_NT,
        returns_NT=estimates.returns_BT,
        scores_N=answer_scores_N,
        kl_N=sum_by_answer(differences_NT, mask_NT),
        sums=sums,
        kl_coef=_keep_finite(next_coef, kl_coef),
        running=running,
    )


def rollout_fields(sums: Mapping[str, Any], *, prefix: str) -> dict[str, float]:
    """Returns the metrics of a rollout.

    Args:
        sums: of `Targets`, on the host.
        prefix: of the names.
    """
    rewarded = float(sums["rewarded"])
    fields = rollout_numbers(sums, prefix=prefix)
    for n in _DISTINCT:
        if f"distinct_{n}" in sums:
            fields |= distinct_numbers(sums, n=n, prefix=prefix)
    fields[f"{prefix}/reward"] = ratio(sums["reward"], rewarded)
    fields[f"{prefix}/answer_score"] = ratio(sums["answer_score"], rewarded)
    for name, whole in _SHARES.items():
        if name in sums:
            fields[f"{prefix}/{name}"] = ratio(sums[name], float(sums[whole]))
    of_critic = {
        name.removeprefix("critic/"): value
        for name, value in sums.items()
        if name.startswith("critic/")
    }
    if of_critic:
        fields |= value_numbers(of_critic, prefix=prefix)
    return fields


def on_host(targets: Targets) -> Targets:
    """Returns the same with numpy arrays, but for what goes into the state."""
    return targets._replace(
        advantages_NT=np.asarray(targets.advantages_NT),
        returns_NT=np.asarray(targets.returns_NT),
        scores_N=np.asarray(targets.scores_N),
        kl_N=np.asarray(targets.kl_N),
        sums={name: np.asarray(value) for name, value in targets.sums.items()},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShapes:
    """The shapes that the rows of minibatches come in.

    Several short rows end to end leave less padding: no answer that is longer than half a row is
    alone in it. A micro-batch has no more slots for it, as it has fewer rows.

    Attributes:
        num_answers: of a minibatch at most.
        longest: tokens of an answer and its prompt at most.
        rows_at_once: of a micro-batch, rows of one longest answer; it divides `num_answers`.
        shards: of the mesh, which divide a micro-batch.
        packed: whether a row holds several answers.
    """

    num_answers: int
    longest: int
    rows_at_once: int
    shards: int
    packed: bool = True

    @classmethod
    def of(cls, cfg: PpoConfig, mesh: Mesh) -> "RowShapes":
        """Returns those of a run's settings on a mesh."""
        return cls(
            num_answers=cfg.minibatch_size,
            longest=cfg.max_length,
            rows_at_once=cfg.rows_at_once,
            shards=batch_shards(mesh),
            packed=cfg.packed,
        )

    @property
    def in_one(self) -> int:
        """The longest answers that the widest row has room for, a power of two."""
        number = 1
        while (
            self.packed
            and 2 * number * self.longest <= _WIDEST
            and self.rows_at_once % (2 * number * self.shards) == 0
        ):
            number *= 2
        return number

    @property
    def width(self) -> int:
        """Tokens of the widest row."""
        return self.in_one * self.longest

    @property
    def worth_another_width(self) -> float:
        """The share of the widest rows' slots that rows of another width have to save.

        Programs of several short rows compile for as long as they run in many iterations. Rows of
        one answer have two widths at most.
        """
        return _WORTH_COMPILING if self.in_one > 1 else 0.0

    @property
    def num_rows(self) -> int:
        """Of the widest, as many as hold any minibatch."""
        return self.num_answers // self.in_one

    def at_once(self, width: int) -> int:
        """Returns the rows of a micro-batch, of rows of some width."""
        return self.rows_at_once // (self.in_one if width > self.longest else 1)

    def row_counts(self, narrow: int) -> dict[int, tuple[int, ...]]:
        """Returns the numbers of rows that packed minibatches come in, by their width.

        The widest rows first, then, of several longest answers, somewhat narrower ones, which leave
        less empty where the last row would be. A mesh of many devices wants more rows than short
        answers need: for it there are rows of one answer.

        Args:
            narrow: tokens of a row that holds any single answer of the rollout; `longest` at most.
        """
        # Rows of one long answer come in few widths: their programs take long to compile.
        least = self.width // 2 if self.in_one > 1 else self.width - 1
        widths = dict.fromkeys([*range(self.width, least, -_WIDTHS), narrow])
        return {
            width: row_counts(
                self.num_answers // (self.rows_at_once // self.at_once(width)),
                rows_at_once=self.at_once(width),
                shards=self.shards,
            )
            for width in widths
        }


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of some answers of a rollout (n of them) in a minibatch.

    Attributes:
        numbers_n: of the answers in the rollout.
        lengths_n: tokens of each, with its prompt.
        rows_n: its row.
        starts_n: its first slot there.
        segments_n: its segment, from 1.
        num_rows: R, those that only fill up the minibatch among them.
        width: of a row.
    """

    numbers_n: Numbers
    lengths_n: Numbers
    rows_n: Numbers
    starts_n: Numbers
    segments_n: Numbers
    num_rows: int
    width: int

    def pack(self, rollout: Mapping[str, npt.NDArray[Any]]) -> Rows:
        """Packs the minibatch.

        Args:
            rollout: arrays `[N, T]`, one answer a row, from slot 0.

        Returns:
            Those arrays as `[R, width]`, zero where there is no token, `segment_ids` anew; and
            `answers`, int32: which of the n answers a token belongs to, n outside of them.
        """
        here, there = self._here(), self._there()
        numbers = {
            "segment_ids": (self.segments_n, 0),
            "answers": (np.arange(len(self.numbers_n)), len(self.numbers_n)),
        }
        packed = {}
        for name, array_NT in rollout.items():
            if name not in numbers:
                packed[name] = np.zeros((self.num_rows, self.width), array_NT.dtype)
                packed[name][here] = array_NT[there]
        for name, (of_n, nothing) in numbers.items():
            packed[name] = np.full((self.num_rows, self.width), nothing, np.int32)
            packed[name][here] = np.repeat(of_n, self.lengths_n)
        return packed

    def unpack(self, minibatch_RT: Any, into_NT: npt.NDArray[Any]) -> None:
        """Writes numbers of the minibatch's tokens where the rollout has them."""
        into_NT[self._there()] = np.asarray(minibatch_RT)[self._here()]

    def _here(self) -> tuple[Numbers, Numbers]:
        """Returns row and slot in the minibatch of every token."""
        places = self._inside() + np.repeat(self.starts_n, self.lengths_n)
        return np.repeat(self.rows_n, self.lengths_n), places

    def _there(self) -> tuple[Numbers, Numbers]:
        """Returns row and slot in the rollout of every token."""
        return np.repeat(self.numbers_n, self.lengths_n), self._inside()

    def _inside(self) -> Numbers:
        """Returns the place of every token in its answer."""
        ends_n = np.cumsum(self.lengths_n)
        return np.arange(self.lengths_n.sum()) - np.repeat(ends_n - self.lengths_n, self.lengths_n)


def packed_layout(
    numbers_n: Numbers,
    lengths_n: Numbers,
    *,
    row_counts: Mapping[int, tuple[int, ...]],
    worth_another_width: float = 0.0,
) -> Layout:
    """Packs answers into the width of rows that comes to the fewest slots, or into the first.

    Args:
        numbers_n: of the answers in the rollout.
        lengths_n: tokens of each.
        row_counts: for each width of a row, numbers of rows to choose from; those of one width are
            enough for any answers. Of equal ones the first is taken.
        worth_another_width: the share of the slots of the first width that holds the answers which
            another one has to save; as each is compiled, else that first one is taken.
    """
    found = []
    for width, counts in row_counts.items():
        if width >= lengths_n.max():
            rows_n, needed = best_fit_rows(lengths_n, width)
            if needed <= counts[-1]:
                num_rows = bucket_of(needed, counts)
                found.append((num_rows * width, num_rows, width, rows_n))
    fewest = min(found, key=operator.itemgetter(0))
    is_worth_it = fewest[0] <= (1 - worth_another_width) * found[0][0]
    _, num_rows, width, rows_n = fewest if is_worth_it else found[0]
    # Within a row they are in the order of the minibatch.
    order = np.argsort(rows_n, kind="stable")
    is_first = np.append(True, np.diff(rows_n[order]) > 0)
    ahead = np.cumsum(lengths_n[order]) - lengths_n[order]
    row_begins = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
    starts_n, segments_n = np.empty_like(lengths_n), np.empty_like(lengths_n)
    starts_n[order] = ahead - ahead[row_begins]
    segments_n[order] = np.arange(len(order)) - row_begins + 1
    return Layout(
        numbers_n,
        lengths_n,
        rows_n,
        starts_n,
        segments_n,
        num_rows=num_rows,
        width=width,
    )


def plain_layout(numbers_n: Numbers, lengths_n: Numbers, *, width: int) -> Layout:
    """Lays one answer a row, in their order."""
    number = len(numbers_n)
    return Layout(
        numbers_n,
        lengths_n,
        np.arange(number),
        np.zeros(number, np.int64),
        np.ones(number, np.int64),
        num_rows=number,
        width=width,
    )


def row_counts(minibatch_size: int, *, rows_at_once: int, shards: int) -> tuple[int, ...]:
    """Returns the numbers of rows that minibatches come in.

    Whole micro-batches, or less than one where that is enough.

    Args:
        minibatch_size: the largest.
        rows_at_once: of a micro-batch, which divides it.
        shards: of the mesh, which divide a micro-batch.
    """
    few = {shards * size for size in ladder(1, rows_at_once // shards)}
    many = {rows_at_once * size for size in ladder(1, minibatch_size // rows_at_once)}
    return tuple(sorted(few | many))


def _estimates(
    rewards_NT: jax.Array,
    rewarded_NT: jax.Array,
    ended_N: jax.Array,
    experience: Experience,
    cfg: PpoConfig,
) -> Estimates:
    """Estimates by the config; answers without a reward get advantage 0 and their values."""
    mask_NT = experience.mask_NT
    if not cfg.has_critic:
        totals_PG = sum_by_answer(rewards_NT, mask_NT).reshape(-1, cfg.rollout.answers_per_prompt)
        applies_PG = rewarded_NT.any(axis=1).reshape(totals_PG.shape)
        if cfg.estimator in ("reinforce", "reinforce_group"):
            baselines_N = None
            if cfg.estimator == "reinforce_group":
                means_P1 = group_means(totals_PG, applies_BG=applies_PG)
                baselines_N = jnp.broadcast_to(means_P1, totals_PG.shape).reshape(-1)
            advantages_NT = reinforce_advantages(
                rewards_NT, rewarded_NT, gamma=cfg.gamma, baselines_B=baselines_N
            )
            if cfg.whiten_advantages:
                statistics = moments(advantages_NT, rewarded_NT)
                advantages_NT = whiten(advantages_NT, rewarded_NT, statistics)
            return Estimates(advantages_NT, jnp.zeros_like(advantages_NT))
        if cfg.estimator == "rloo":
            advantages_PG = rloo_advantages(totals_PG, applies_BG=applies_PG)
        else:
            advantages_PG = grpo_advantages(
                totals_PG, divide_by_deviation=cfg.divide_by_deviation, applies_BG=applies_PG
            )
        advantages_NT = over_tokens(advantages_PG.reshape(-1), mask_NT)
        return Estimates(advantages_NT, jnp.zeros_like(advantages_NT))
    after_N = None
    if cfg.score.on_truncation == "bootstrap":
        at_end_NT = last_tokens(mask_NT) & ~ended_N[:, None]
        after_N = masked(experience.values_after_NT, at_end_NT).sum(axis=1)
    found = gae(
        rewards_NT,
        experience.values_NT,
        mask_NT,
        gamma=cfg.gamma,
        lambda_=cfg.gae_lambda,
        values_after_B=after_N,
    )
    advantages_NT = masked(found.advantages_BT, rewarded_NT)
    if cfg.whiten_advantages:
        advantages_NT = whiten(advantages_NT, rewarded_NT, moments(advantages_NT, rewarded_NT))
    # The critic stays where it is on an answer that says nothing about it.
    returns_NT = jnp.where(rewarded_NT, found.returns_BT, masked(experience.values_NT, mask_NT))
    return Estimates(advantages_NT, returns_NT)


def _all_or(has_reward_N: jax.Array | None, like_N: jax.Array) -> jax.Array:
    return jnp.ones_like(like_N) if has_reward_N is None else jnp.asarray(has_reward_N)


def _scaled(
    scores_N: jax.Array, cfg: PpoConfig, running: Moments, normalization: Normalization | None
) -> jax.Array:
    # A mix has the reward model's scores normalised before it sums them.
    if cfg.score.scale == "raw" or (cfg.score.scale == "stored" and cfg.reward is not None):
        return scores_N
    if cfg.score.scale == "running":
        # Scores that are all the same are at their mean, whatever they are divided by.
        deviation = running.standard_deviation
        deviation = jnp.where(deviation == 0, 1.0, deviation)
        return normalised_scores(scores_N, mean=running.mean, standard_deviation=deviation)
    assert normalization is not None
    return normalised_scores(
        scores_N, mean=normalization.mean, standard_deviation=normalization.standard_deviation
    )


def _distinct(num_slots: int) -> tuple[int, ...]:
    return tuple(n for n in _DISTINCT if n <= num_slots)


def _keep_finite(new: Any, old: Any) -> Any:
    """Takes the new numbers if all of them are finite."""
    is_finite = jnp.stack([jnp.isfinite(leaf) for leaf in jax.tree.leaves(new)]).all()
    return jax.tree.map(lambda one, other: jnp.where(is_finite, one, other), new, old)
