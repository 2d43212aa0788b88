"""One PPO iteration: the policy samples, answers are scored, policy and critic are updated.

Everything random in it is a function of the run's key, the iteration and the place of a row.

A pass over a minibatch, with or without its gradient, is one compiled program: whether to
differentiate is decided at run time, after the forward pass. So numbers computed before an update
(old log-probabilities, old values, the reference's) equal those of the update's first minibatch bit
for bit.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.core import sharding
from huatuo_jax.core.sharding import OnMesh, put_whole
from huatuo_jax.data.mixture import permutation
from huatuo_jax.generation.requests import Answer
from huatuo_jax.ppo.advantages import Moments, no_moments
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.models import Critic
from huatuo_jax.ppo.prompts import Prompts
from huatuo_jax.ppo.ptx import Ptx
from huatuo_jax.ppo.redrawing import with_variance
from huatuo_jax.ppo.report import IterationReport, Spent, UpdateSums
from huatuo_jax.ppo.reward_mix import Floats, Rewards, RewardSource
from huatuo_jax.ppo.rollout import Rollout, Sampler
from huatuo_jax.ppo.targets import (
    Experience,
    Layout,
    MakeTargets,
    Rows,
    RowShapes,
    Targets,
    on_host,
    packed_layout,
    plain_layout,
)
from huatuo_jax.training.losses import wide
from huatuo_jax.training.optimizer import Optimizer, advance_schedule
from huatuo_jax.training.update import (
    Batch,
    LossSums,
    Metrics,
    Outputs,
    TrainState,
    Variables,
    apply_gradients,
    in_place,
    join,
    over_micro_batches,
)

RowLoss = Callable[[Variables, Batch, jax.Array], tuple[LossSums, Outputs]]
"""Told variables, rows and the KL coefficient."""

NUMBERS_OF_TOKENS = (
    "old_log_probs",
    "reference_log_probs",
    "advantages",
    "old_values",
    "returns",
)
"""What a minibatch holds beside its rows, float32 each."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PpoState:
    """All that the next iteration needs; what never changes (the reward model) is not in it.

    Attributes:
        iteration: rollouts that were made and trained on.
        next_prompt: the row of the endless order of prompts that comes next.
        kl_coef: of the next rollout.
        scores: moments of all raw scores so far.
        key: the run's; each rollout's randomness is the iteration folded into it.
        policy: with its optimizer.
        value: the critic with its own; None where there is none.
        reference: as `Trainer.reference`, where it moves; None where it never changes.
    """

    iteration: jax.Array
    next_prompt: jax.Array
    kl_coef: jax.Array
    scores: Moments
    key: jax.Array
    policy: TrainState
    value: TrainState | None
    reference: Variables | None = None


class Pass(NamedTuple):
    """Result of a pass over a minibatch.

    Attributes:
        sums: over all of its rows.
        outputs: of each row.
        gradients: of the summed loss, in at least float32; zero where none was wanted.
    """

    sums: LossSums
    outputs: Outputs
    gradients: Variables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """The compiled programs of a model that is trained.

    Attributes:
        run_pass: see `compile_pass`.
        apply: see `compile_apply`.
    """

    run_pass: OnMesh
    apply: OnMesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """Everything that stays the same from one iteration to the next.

    Attributes:
        cfg: the run's settings.
        mesh: where everything lies.
        prompts: what is asked.
        sampler: answers.
        rewards: rewards the answers.
        make_targets: see `targets.make_targets`.
        policy: its programs.
        reference: takes the place of the policy's trained variables, see `ppo.reference`; None
            where it moves and is in the state.
        critic: where its frozen variables are; None without one.
        value: its programs; None without one.
        ptx: adds the loss of fine-tuning to the policy's; None for none.
        sync: moves the reference, see `reference.compile_sync`; None where it stays.
    """

    cfg: PpoConfig
    mesh: Mesh
    prompts: Prompts
    sampler: Sampler
    rewards: RewardSource
    make_targets: MakeTargets
    policy: Learner
    reference: Variables | None
    critic: Critic | None
    value: Learner | None
    ptx: Ptx | None = None
    sync: OnMesh | None = None

    def iterate(self, state: PpoState) -> tuple[PpoState, IterationReport]:
        """Makes one more iteration; the state before is used up."""
        spent = Spent()
        trains_policy = int(state.iteration) >= self.cfg.warmup_iterations
        rounds = self.cfg.rollout.redraw_rounds
        evaluated: list[dict[str, Floats]] = []

        def evaluate(rollout: Rollout) -> None:
            with spent.on("log_probs"):
                evaluated.append(self._evaluated(state, rollout))

        def draw(number: int, first: int, num_prompts: int) -> tuple[Rollout, Rewards]:
            self.rewards.begin(f"iteration {int(state.iteration) + 1}")
            with spent.on("generation"):
                rollout = self._sample(state, number, first, num_prompts)
            if not rounds:  # No answer will be replaced: a judge goes on meanwhile.
                evaluate(rollout)
            return rollout, self._rewarded(rollout, spent)

        drawn = with_variance(
            draw, self.sampler.lay, num_prompts=self.cfg.rollout.num_prompts, rounds=rounds
        )
        rollout, rewards = drawn.rollout, drawn.rewards
        if rounds:
            evaluate(rollout)
        if self.cfg.reward is not None:
            rewards.check(self.cfg.reward, iteration=int(state.iteration) + 1)
        layouts = [self._layouts(state, rollout, epoch) for epoch in range(self.cfg.num_epochs)]
        with spent.on("log_probs"):
            experience = _experience(rollout, rewards, evaluated[0])
            targets = on_host(self.make_targets(experience, state.kl_coef, state.scores))
        with spent.on("update"):
            rows = self._training_rows(rollout, experience, targets)
            state, sums = self._update(state, rows, layouts, trains_policy=trains_policy)
            state = self._with_reference_moved(state)
        report = IterationReport(
            cfg=self.cfg,
            iteration=int(state.iteration) + 1,
            kl_coef=float(state.kl_coef),
            rollout=rollout,
            rewards=rewards,
            num_prompts=drawn.num_prompts,
            targets=targets,
            update=sums,
            spent=spent,
        )
        place = jax.NamedSharding(self.mesh, jax.P())
        # Before its first step the policy's KL is 0, whatever the coefficient is.
        kl_coef = targets.kl_coef if trains_policy else state.kl_coef
        return dataclasses.replace(
            state,
            iteration=state.iteration + 1,
            next_prompt=state.next_prompt + drawn.num_prompts,
            kl_coef=jax.device_put(kl_coef, place),
            scores=jax.device_put(targets.running, place),
        ), report

    def reference_in(self, state: PpoState) -> Variables:
        """Returns the reference of an iteration, in place of the policy's trained variables."""
        found = self.reference if state.reference is None else state.reference
        assert found is not None
        return found

    def _rewarded(self, rollout: Rollout, spent: Spent) -> Rewards:
        """Waits for what was begun while answers were sampled, and rewards all of them."""
        if self.rewards.takes:
            with spent.on("judging"):
                self.rewards.wait()
        with spent.on("scoring"):
            return self.rewards.of(
                rollout.prompt_of_each, rollout.answers, group=self.cfg.rollout.answers_per_prompt
            )

    def _sample(
        self, state: PpoState, number: int = 0, first: int = 0, num_prompts: int | None = None
    ) -> Rollout:
        """Samples answers to so many prompts, all of an iteration's where it is not said."""
        place = int(state.next_prompt) + first
        num_prompts = num_prompts or self.cfg.rollout.num_prompts
        prompts = self.prompts.rows(place, num_prompts, seed=self.cfg.seed)
        key = jax.random.fold_in(state.key, state.iteration)
        if number:
            key = jax.random.fold_in(key, number)
        group = self.cfg.rollout.answers_per_prompt

        def take(place: int, answer: Answer) -> None:
            self.rewards.take(place, prompts[place // group], answer)

        return self.sampler.sample(state.policy.variables, prompts, key, take)

    def _layouts(self, state: PpoState, rollout: Rollout, epoch: int) -> list[Layout]:
        """Returns the minibatches of a pass over the rollout."""
        cfg, iteration = self.cfg, int(state.iteration)
        order = permutation(cfg.rollout.num_answers, "rows", cfg.seed, iteration, epoch)
        lengths_N = rollout.rows["segment_ids"].sum(axis=1, dtype=np.int64)
        width = rollout.rows["segment_ids"].shape[1]
        make = functools.partial(plain_layout, width=width)
        if cfg.packed:
            shapes = RowShapes.of(cfg, self.mesh)
            make = functools.partial(
                packed_layout,
                row_counts=shapes.row_counts(narrow=width),
                worth_another_width=shapes.worth_another_width,
            )
        numbers = np.split(order, cfg.num_minibatches)
        return [make(numbers_n, lengths_N[numbers_n]) for numbers_n in numbers]

    def _evaluated(self, state: PpoState, rollout: Rollout) -> dict[str, Floats]:
        """Evaluates the rollout under all models, by the programs of the update.

        In the minibatches of the first pass, so that each of those meets the very numbers it would
        compute itself.
        """
        zeros_NT = np.zeros(rollout.rows["mask"].shape, np.float32)
        found = {
            name: zeros_NT.copy() for name in ("log_probs", "reference", "values", "values_after")
        }
        empty = dict.fromkeys(NUMBERS_OF_TOKENS, zeros_NT)
        for layout in self._layouts(state, rollout, epoch=0):
            rows = self._placed(rollout.rows | empty, layout)
            # Of each pass the outputs alone are held: its gradients take as much memory as a model.
            policy = self._policy_pass(state, rows, differentiate=False).outputs
            reference = self._policy_pass(
                state, rows, differentiate=False, trained=self.reference_in(state)
            ).outputs
            layout.unpack(policy["log_probs"], found["log_probs"])
            layout.unpack(reference["log_probs"], found["reference"])
            if self.value is not None:
                critic = self._value_pass(state, rows, differentiate=False).outputs
                for name, values_BT in critic.items():
                    layout.unpack(values_BT, found[name])
        return found

    def _training_rows(self, rollout: Rollout, experience: Experience, targets: Targets) -> Rows:
        mask_NT = rollout.rows["mask"]
        if not self.cfg.trains_on_truncated:
            ended_N = np.array([one.finish_reason == "stop" for one in rollout.answers])
            mask_NT = mask_NT & ended_N[:, None]
        return rollout.rows | {
            "mask": mask_NT,
            "old_log_probs": experience.old_log_probs_NT,
            "reference_log_probs": experience.reference_log_probs_NT,
            "advantages": targets.advantages_NT,
            "old_values": experience.values_NT,
            "returns": targets.returns_NT,
        }

    def _update(
        self,
        state: PpoState,
        rows: Rows,
        layouts: Sequence[Sequence[Layout]],
        *,
        trains_policy: bool,
    ) -> tuple[PpoState, UpdateSums]:
        """Makes all passes over the rollout, or those up to the bound of the KL.

        The learning rates go by the plan of the run: updates that the bound leaves out are passed
        over in their schedules, which end with the run all the same.
        """
        sums = UpdateSums()
        planned = list(itertools.chain.from_iterable(layouts))
        for number, layout in enumerate(planned):
            minibatch = self._placed(rows, layout)
            if trains_policy:
                found = self._policy_pass(state, minibatch, differentiate=True)
                if self._is_too_far(found):
                    sums.stopped_early = True
                    state = _without_updates(state, len(planned) - number)
                    break
                sums_of_step, gradients = found.sums, found.gradients
                if self.ptx is not None:
                    step = int(state.iteration) * len(planned) + number
                    sums_of_step, gradients = self.ptx.added(
                        state.policy, sums_of_step, gradients, step=step
                    )
                policy, metrics = self.policy.apply(state.policy, sums_of_step, gradients)
                sums.policy.append(metrics)
                state = dataclasses.replace(state, policy=policy)
                del found, gradients  # Before the critic makes its own.
            if self.value is not None:
                found = self._value_pass(state, minibatch, differentiate=True)
                assert state.value is not None
                value, metrics = self.value.apply(state.value, found.sums, found.gradients)
                sums.value.append(metrics)
                state = dataclasses.replace(state, value=value)
                del found
        return state, sums.on_host()

    def _with_reference_moved(self, state: PpoState) -> PpoState:
        sync = self.cfg.reference_sync
        if sync is None or (int(state.iteration) + 1) % sync.every:
            return state
        assert self.sync is not None
        moved = self.sync(state.policy.trained, state.reference)
        return dataclasses.replace(state, reference=moved)

    def _is_too_far(self, found: Pass) -> bool:
        if self.cfg.stop_at_kl is None:
            return False
        others = found.sums.others
        # A number that is not finite is no reason to stop: the step is skipped and counted.
        return float(others["approximate_kl_k3"]) > self.cfg.stop_at_kl * float(others["tokens"])

    def _policy_pass(
        self,
        state: PpoState,
        rows: Mapping[str, jax.Array],
        *,
        differentiate: bool,
        trained: Variables | None = None,
    ) -> Pass:
        policy = state.policy
        return self.policy.run_pass(
            policy.trained if trained is None else trained,
            policy.frozen,
            rows,
            state.kl_coef,
            differentiate,
        )

    def _value_pass(
        self, state: PpoState, rows: Mapping[str, jax.Array], *, differentiate: bool
    ) -> Pass:
        assert self.value is not None and self.critic is not None and state.value is not None
        value: TrainState = state.value
        frozen = self.critic.frozen(value.frozen, state.policy.frozen)
        return self.value.run_pass(value.trained, frozen, rows, state.kl_coef, differentiate)

    def _placed(self, rows: Rows, layout: Layout) -> dict[str, jax.Array]:
        return put_whole(layout.pack(rows), self.mesh)


def _experience(rollout: Rollout, rewards: Rewards, found: Mapping[str, Floats]) -> Experience:
    return Experience(
        token_ids_NT=rollout.rows["token_ids"],
        mask_NT=rollout.rows["mask"],
        old_log_probs_NT=found["log_probs"],
        reference_log_probs_NT=found["reference"],
        sampler_log_probs_NT=rollout.sampler_log_probs_NT,
        raw_scores_N=rewards.scores_N,
        values_NT=found["values"],
        values_after_NT=found["values_after"],
        has_reward_N=rewards.has_reward_N,
    )


def new_ppo_state(
    policy: TrainState,
    value: TrainState | None,
    *,
    kl_coef: float,
    seed: int,
    mesh: Mesh,
    reference: Variables | None = None,
) -> PpoState:
    """Makes the state before the first iteration."""
    everywhere = jax.NamedSharding(mesh, jax.P())
    small = jax.jit(_beside_the_models, static_argnums=(0, 1), out_shardings=everywhere)
    return PpoState(**small(kl_coef, seed), policy=policy, value=value, reference=reference)


def abstract_ppo_state(
    policy: TrainState,
    value: TrainState | None,
    mesh: Mesh,
    *,
    reference: Variables | None = None,
) -> PpoState:
    """Returns that state's shapes and shardings, from those of its parts."""
    everywhere = jax.NamedSharding(mesh, jax.P())

    def scalar(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)

    small = jax.tree.map(scalar, _beside_the_models(kl_coef=0.0, seed=0))
    return PpoState(**small, policy=policy, value=value, reference=reference)


def compile_pass(
    loss: RowLoss, state: TrainState, mesh: Mesh, *, rows_at_once: int | Callable[[int], int]
) -> sharding.OnMesh:
    """Compiles the pass under one `jax.jit`.

    Args:
        loss: sums over the rows it is given, and numbers of each.
        state: whose variables it will be given, or its abstract form.
        mesh: where state and batch lie.
        rows_at_once: rows of a micro-batch, or what tells them for the tokens of a row; changes
            rounding only. Of rows that it does not divide there are fewer, and all go together.

    Returns:
        From trained and frozen variables, rows, the KL coefficient, and whether to differentiate,
        to a `Pass`.
    """
    places = sharding.parameter_shardings(state.trained, mesh)
    everywhere = jax.NamedSharding(mesh, jax.P())

    def run(
        trained: Variables,
        frozen: Variables,
        batch: Batch,
        kl_coef: jax.Array,
        differentiate: jax.Array,
    ) -> Pass:
        def one(rows: Batch) -> tuple[tuple[LossSums, Variables], Outputs]:
            return _one_pass(
                lambda trained: loss(join(trained, frozen), rows, kl_coef), trained, differentiate
            )

        num_rows, width = batch["mask"].shape
        at_once = rows_at_once if isinstance(rows_at_once, int) else rows_at_once(width)
        number = max(num_rows // at_once, 1)
        (sums, gradients), outputs = over_micro_batches(one, batch, trained, number)
        return Pass(sums, outputs, gradients)

    prefix: Any = (everywhere, everywhere, places)
    return sharding.OnMesh(jax.jit(run, out_shardings=Pass(*prefix)), mesh)


def compile_apply(optimizer: Optimizer, state: TrainState, mesh: Mesh) -> sharding.OnMesh:
    """Compiles the step from a pass's gradients, under one `jax.jit`; the old state is used up.

    A step whose loss or gradient is not finite is skipped and counted, as `training.update` does.

    Args:
        optimizer: of the state.
        state: a state, or its abstract form.
        mesh: where it lies.

    Returns:
        From a state, and the sums and gradients of a pass, to the next state and its metrics.
    """
    places = sharding.parameter_shardings(state, mesh)

    def apply(
        state: TrainState, sums: LossSums, gradients: Variables
    ) -> tuple[TrainState, Metrics]:
        new, metrics = apply_gradients(
            dataclasses.replace(state, frozen={}), sums, gradients, optimizer
        )
        return dataclasses.replace(new, frozen=state.frozen), metrics

    compiled = jax.jit(
        apply,
        out_shardings=(places, jax.NamedSharding(mesh, jax.P())),
        donate_argnums=0,
    )
    return sharding.OnMesh(compiled, mesh)


def _one_pass(
    loss: Callable[[Variables], tuple[LossSums, Outputs]],
    trained: Variables,
    differentiate: jax.Array,
) -> tuple[tuple[LossSums, Variables], Outputs]:
    def summed(trained: Variables) -> tuple[jax.Array, tuple[LossSums, Outputs]]:
        sums, outputs = loss(trained)
        return sums.loss, (sums, outputs)

    value, pull_back, (sums, outputs) = jax.vjp(summed, trained, has_aux=True)

    def gradients() -> Variables:
        return in_place(jax.tree.map(wide, pull_back(jnp.ones_like(value))[0]), trained)

    def zeros() -> Variables:
        return in_place(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide(leaf).dtype), trained), trained
        )

    return (sums, jax.lax.cond(differentiate, gradients, zeros)), outputs


def _beside_the_models(kl_coef: float, seed: int) -> dict[str, Any]:
    """Makes all of the first state but policy and critic."""
    return {
        "iteration": jnp.zeros((), jnp.int32),
        "next_prompt": jnp.zeros((), jnp.int32),
        "kl_coef": jnp.asarray(kl_coef, jnp.float32),
        "scores": no_moments(),
        "key": jax.random.key(seed),
    }


def _without_updates(state: PpoState, number: int) -> PpoState:
    """Passes over so many planned updates in the schedules of the learning rates."""

    def advanced(part: TrainState) -> TrainState:
        return dataclasses.replace(part, opt_state=advance_schedule(part.opt_state, number))

    return dataclasses.replace(
        state,
        policy=advanced(state.policy),
        value=None if state.value is None else advanced(state.value),
    )
