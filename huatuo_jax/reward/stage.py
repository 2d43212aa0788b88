"""The reward stage: a backbone and comparisons in, a reward model with its normalization out.

Bradley and Terry (1952): the answer with score r is preferred over the one with score s with
probability sigmoid(r - s); as a loss of a language model, InstructGPT (arXiv 2203.02155, equation
1). Labels may be soft: `p_chosen` is the probability that the judge prefers the chosen answer.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from jax.sharding import Mesh

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import distributed
from huatuo_jax.core.progress import progress_bar
from huatuo_jax.data.accounting import Account
from huatuo_jax.preferences.data import (
    Answer,
    Comparisons,
    Group,
    groups_hash,
)
from huatuo_jax.preferences.rows import PreferenceStage, check_fits, open_probe
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.reward.report import (
    all_answers,
    given,
    length_slope,
    make_report,
    probe_report,
    write_report,
)
from huatuo_jax.reward.score_file import answers_hash, read_answers
from huatuo_jax.training.initial_model import InitialModel, ModelConfig, open_model
from huatuo_jax.training.loop import Job, StepReport, step_numbers
from huatuo_jax.training.losses import row_sizes
from huatuo_jax.training.metrics import ModelFlops
from huatuo_jax.training.run_directory import StageDirectory
from huatuo_jax.training.scoring import Normalization, Scorer, head_scores, save_normalization
from huatuo_jax.training.stage import MODEL_FOLDER, run_stage, stage_step
from huatuo_jax.training.update import Batch, LossSums, Step, TrainState, Variables

STAGE = "reward"
TRAINING_ANSWERS = "the chosen and rejected answers of the training comparisons, each once"


class RewardStage(PreferenceStage[RewardConfig]):
    """One run of reward training."""

    name = STAGE
    probes: dict[str, tuple[Group, ...]]
    normalization_answers: list[Answer] | None = None

    @staticmethod
    def open_model(cfg: RewardConfig) -> InitialModel:
        """Finds the backbone and checks that the comparisons suit it."""
        return open_backbone(cfg, cfg.model)

    def open_data(self) -> dict[str, Any]:
        """Reads comparisons, probes, and the answers for the normalization of scores."""
        cfg, found = self.cfg, super().open_data()
        self.probes = _open_probes(cfg, self.tokenizer, trained_on=self.comparisons.train)
        found["normalization_answers"] = None
        if cfg.normalization_answers is not None:
            self._normalization_account = Account("answers")
            answers = read_answers(
                cfg.normalization_answers, cfg.data, self.tokenizer, self._normalization_account
            )
            self.normalization_answers = answers
            found["normalization_answers"] = answers_hash(answers)
        if self.probes:
            probes = self.probes.items()
            found["probe_pairs"] = {name: groups_hash(groups) for name, groups in probes}
        return found

    def make_job(self, directory: StageDirectory, decisive: Mapping[str, Any]) -> Job:
        """Reports on the answers for the normalization, and makes the job of the loop."""
        if self.normalization_answers is not None and distributed.is_first():
            for line in self._normalization_account.lines():
                print(f"{STAGE}: for the normalization: {line}", flush=True)
        return super().make_job(directory, decisive)

    def make_step(self, cfg: RewardConfig, *, num_steps: int) -> Step:
        """Makes the optimizer step of a run of so many steps."""
        return reward_step(cfg, self.model, self.mesh, num_steps=num_steps)

    def report(self, metrics: Mapping[str, np.ndarray]) -> StepReport:
        """Returns the numbers of an optimizer step."""
        return report_step(metrics, flops=self.model.flops)

    def evaluation_numbers(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns the numbers of held-out data."""
        return numbers(sums, prefix="eval")

    def finish(
        self, directory: StageDirectory, state: TrainState, numbers: Mapping[str, float]
    ) -> dict[str, Any]:
        """Saves the model with its normalization, and writes the held-out report."""
        result = super().finish(directory, state, numbers)
        cfg = self.cfg
        scorer = Scorer(
            self.model.transformer,
            state.variables,
            mesh=self.mesh,
            rows_at_once=cfg.rows_at_once,
            row_length=cfg.data.row_length,
            packed=cfg.data.packed,
        )
        normalization = _normalize(cfg, scorer, self.comparisons, self.normalization_answers)
        result |= {f"normalization/{k}": v for k, v in normalization.to_json().items()}
        if distributed.is_first():
            save_normalization(directory.folder / MODEL_FOLDER, normalization)
        return result | _report(cfg, scorer, self.comparisons, self.probes, directory)


def run_reward(
    config: RewardConfig,
    workdir: str | os.PathLike[str],
    *,
    after_evaluation: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Runs the stage, resuming from its newest checkpoint; returns the saved result if it is done.

    Args:
        config: of the stage; `{workdir}` in a path stands for the run's folder.
        workdir: the run's folder.
        after_evaluation: called after each evaluation, in the first process alone.

    Returns:
        The last step and its evaluation, the normalization and which answers it is of. The model
        is in `WORKDIR/reward/model`, an Orbax directory with the tokenizer, adapters merged, and
        `reward_normalization.json`; beside it is `reward_report.json` with its plot, where
        anything was held out.

    Raises:
        ValueError: an invalid config, file, model or mesh; before anything is compiled.
        FileNotFoundError: there is no such model.
        Interrupted: the run was stopped and saved.
        Diverged: too many steps in a row were not finite.
        OSError: something cannot be read or written.
    """
    return run_stage(RewardStage, RewardConfig, config, workdir, after_evaluation=after_evaluation)


def open_backbone(cfg: RewardConfig, section: ModelConfig) -> InitialModel:
    """Finds the backbone that the stage begins with; no weight of it is read.

    Args:
        cfg: the run's settings.
        section: which backbone.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is none that this project can do, or the rows do not suit it.
    """
    model = open_model(
        section,
        cfg.compute.compute_config(),
        head="score",
        head_init=cfg.head_init,
        head_only=cfg.head_only,
    )
    check_fits(cfg.data, model.cfg, stage=STAGE)
    return model


def reward_step(cfg: RewardConfig, model: InitialModel, mesh: Mesh, *, num_steps: int) -> Step:
    """Makes the optimizer step of a run of so many steps."""
    loss = functools.partial(
        reward_loss, model.transformer, margin_scale=cfg.margin_scale, centring=cfg.centring
    )
    abstract_state = functools.partial(model.abstract_state, mesh=mesh)
    return stage_step(cfg, loss, abstract_state, mesh, num_steps=num_steps)


def pair_losses(
    chosen: jax.Array,
    rejected: jax.Array,
    *,
    p_chosen: jax.Array,
    margin: jax.Array | float = 0.0,
    centring: float = 0.0,
) -> jax.Array:
    """Computes each pair's cross-entropy, and penalizes scores that drift away from 0 together.

    Args:
        chosen: scores.
        rejected: scores, of the same shape.
        p_chosen: how likely the chosen answer is the better one, 0 to 1; 0.5 is a tie.
        margin: how far apart the scores have to be beyond what the label asks for (arXiv
            2307.09288, equation 2), chosen minus rejected: swapping the answers of a pair turns its
            sign. The loss of a tie is least where the scores differ by it; a negative one asks
            less of the chosen answer.
        centring: factor of the squared sum of both scores (arXiv 2312.09244, section 2), which
            fixes the level that comparisons leave free.

    Returns:
        One loss a pair, in the dtype of the scores.
    """
    difference = chosen - rejected - margin
    won = jnp.logaddexp(-difference, 0.0)
    lost = jnp.logaddexp(difference, 0.0)
    losses = p_chosen * won + (1 - p_chosen) * lost
    return losses + centring * jnp.square(chosen + rejected) if centring else losses


def reward_loss(
    model: Transformer,
    variables: Variables,
    batch: Batch,
    *,
    margin_scale: float = 0.0,
    centring: float = 0.0,
) -> LossSums:
    """Sums the loss of a batch's pairs; each answer goes through the model once.

    Args:
        model: a backbone with a score head.
        variables: its own.
        batch: rows of answers (`token_ids`, `segment_ids`, `positions`, each `[B, T]`) and pairs
            of answers of one row: `chosen_at` and `rejected_at` (where in the row their last
            tokens stand), `p_chosen`, `margin` and `pair_weight`, each `[B, P]`. A weight of 0 is
            no pair.
        margin_scale: factor of the margins.
        centring: see `pair_losses`.

    Returns:
        `num_terms` is the sum of the weights. Beside the loss: `pairs`; `cross_entropy` without
        margin and centring, weighted as the loss; `labelled` pairs, those that are no tie, and
        `correct` ones among them (equal scores count half); `difference` of scores, turned so that
        the preferred answer comes first; `tokens` without padding; `attended_pairs` of query and
        key.
    """
    scores_BT = head_scores(model, variables, batch)
    weight_BP, p_chosen_BP = batch["pair_weight"], batch["p_chosen"]
    is_pair_BP = weight_BP > 0

    def at(places_BP: jax.Array) -> jax.Array:
        # Scores at padding have no meaning, and must not reach a sum even times 0.
        return jnp.where(is_pair_BP, jnp.take_along_axis(scores_BT, places_BP, axis=1), 0)

    chosen_BP, rejected_BP = at(batch["chosen_at"]), at(batch["rejected_at"])
    losses_BP = pair_losses(
        chosen_BP,
        rejected_BP,
        p_chosen=p_chosen_BP,
        margin=margin_scale * batch["margin"],
        centring=centring,
    )
    plain_BP = pair_losses(chosen_BP, rejected_BP, p_chosen=p_chosen_BP)
    side_BP = jnp.sign(p_chosen_BP - 0.5) * is_pair_BP
    difference_BP = side_BP * (chosen_BP - rejected_BP)
    return LossSums(
        loss=(weight_BP * losses_BP).sum(),
        num_terms=weight_BP.sum(),
        others={
            "pairs": is_pair_BP.sum(),
            "weights": weight_BP.sum(),
            "objective": (weight_BP * losses_BP).sum(),
            "cross_entropy": (weight_BP * plain_BP).sum(),
            "labelled": jnp.abs(side_BP).sum(),
            "correct": (jnp.abs(side_BP) * (jnp.sign(difference_BP) + 1) / 2).sum(),
            "difference": difference_BP.sum(),
            **row_sizes(batch, model.cfg.sliding_window),
        },
    )


def numbers(sums: Mapping[str, np.ndarray], *, prefix: str) -> dict[str, float]:
    """Computes loss and accuracy out of the sums of `reward_loss`.

    Args:
        sums: of a step, or of all held-out data.
        prefix: `train` or `eval`.
    """
    weights, labelled = float(sums["weights"]), float(sums["labelled"])
    found = {f"{prefix}/pairs": float(sums["pairs"])}
    if weights > 0:
        found[f"{prefix}/loss"] = float(sums["objective"]) / weights
        found[f"{prefix}/cross_entropy"] = float(sums["cross_entropy"]) / weights
    if labelled > 0:
        found[f"{prefix}/accuracy"] = float(sums["correct"]) / labelled
        found[f"{prefix}/score_difference"] = float(sums["difference"]) / labelled
    return found


def report_step(metrics: Mapping[str, np.ndarray], *, flops: ModelFlops) -> StepReport:
    """Returns the numbers of an optimizer step."""
    tokens, pairs = float(metrics["tokens"]), float(metrics["attended_pairs"])
    fields = numbers(metrics, prefix="train") | step_numbers(metrics)
    step_flops = flops.of_step(tokens=tokens, scored_tokens=0.0, attended_pairs=pairs)
    return StepReport(fields, tokens, tokens, step_flops)


def _normalize(
    cfg: RewardConfig,
    scorer: Scorer,
    comparisons: Comparisons,
    sft_answers: list[Answer] | None,
) -> Normalization:
    if sft_answers is None:
        answers, which = all_answers(comparisons.train), TRAINING_ANSWERS
    else:
        assert cfg.normalization_answers is not None
        answers, which = sft_answers, pathlib.Path(cfg.normalization_answers).name
    with progress_bar(f"{STAGE}: scoring {len(answers)} answers", "rows") as on_progress:
        scores = scorer.scores([given(one) for one in answers], on_progress)
    return Normalization.of(scores, answers=which)


def _open_probes(
    cfg: RewardConfig,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    trained_on: Sequence[Group],
) -> dict[str, tuple[Group, ...]]:
    """Reads the pairs of each probe; prints what is left out, and what is trained on too."""
    found = {}
    # Cases named by a field do not follow from the prompts, which is all that probes have.
    by_prompt = cfg.data.group_field is None
    trained = {group.case for group in trained_on} if by_prompt else set()
    for probe in cfg.probes:
        groups, account = open_probe(
            probe.paths, cfg.data, tokenizer, name=probe.name, encoding=probe.encoding
        )
        found[probe.name] = groups
        if distributed.is_first():
            lines = account.lines()
            if shared := sum(group.case in trained for group in groups):
                lines.append(f"warning: {shared} of {len(groups)} prompts are trained on, too")
            for line in lines:
                print(f"{STAGE}: probe {probe.name}: {line}", flush=True)
    return found


def _measure_probes(
    cfg: RewardConfig, scorer: Scorer, probes: Mapping[str, tuple[Group, ...]], *, slope: float
) -> list[dict[str, Any]]:
    """Measures each probe; its report is also printed in a line."""
    reports = []
    for probe in cfg.probes:
        groups = probes[probe.name]
        scores = scorer.scores([given(one) for one in all_answers(groups)])
        found = probe_report(groups, scores, probe=probe, slope=slope, seed=cfg.seed)
        reports.append(found)
        if distributed.is_first():
            share, length = found["accuracy"], found["length_accuracy"]
            print(
                f"{STAGE}: pairs that differ in {probe.name}: the {probe.chosen} one scores higher "
                f"in {share['value']:.3f} ({share['low']:.3f} to {share['high']:.3f}) of "
                f"{share['num_pairs']}; by length alone {length['value']:.3f}"
                + (" (0.5 is indifference)" if probe.neutral else ""),
                flush=True,
            )
    return reports


def _report(
    cfg: RewardConfig,
    scorer: Scorer,
    comparisons: Comparisons,
    probes: Mapping[str, tuple[Group, ...]],
    directory: StageDirectory,
) -> dict[str, Any]:
    """Writes the held-out report; the main figures for the stage's result."""
    slope = length_slope(comparisons.train)
    measured = _measure_probes(cfg, scorer, probes, slope=slope)
    apart = {f"report/{one['name']}_accuracy": one["accuracy"]["value"] for one in measured}
    if not comparisons.held_out:
        return apart
    scores = scorer.scores([given(one) for one in all_answers(comparisons.held_out)])
    report = make_report(comparisons.held_out, scores, slope=slope, seed=cfg.seed)
    report["probes"] = measured
    report["comparisons"] = {
        "train_pairs": sum(len(group.pairs) for group in comparisons.train),
        "train_prompts": len(comparisons.train),
        "held_out_prompts": len(comparisons.held_out),
        "dropped": dict(comparisons.dropped),
    }
    if jax.process_index() == 0:
        write_report(directory.folder, report)
    result = {
        "report/calibration_error": report["calibration"]["expected_calibration_error"],
    }
    for name, share in (
        ("accuracy", report["accuracy"]),
        ("length_accuracy", report["length_baseline"]["accuracy"]),
    ):
        if share is not None:
            result[f"report/{name}"] = share["value"]
    return result | apart
