"""One iteration: the policy answers, the answers are scored, policy and critic are trained.

Everything random in it is a function of the run's key, the iteration and the place of a row.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from huatuo_jax.data.shuffling import permutation
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.estimates import Experience, MakeTargets, Targets, on_host
from huatuo_jax.ppo.layout import Layout, Rows, packed_layout, plain_layout, row_counts
from huatuo_jax.ppo.prompts import Prompts
from huatuo_jax.ppo.report import IterationReport, Spent, UpdateSums
from huatuo_jax.ppo.roles import Critic
from huatuo_jax.ppo.rollout import AnswerScorer, Rollout, Sampler
from huatuo_jax.ppo.state import PpoState
from huatuo_jax.ppo.update import Pass
from huatuo_jax.sharding import OnMesh, batch_shards, put_whole
from huatuo_jax.training.optimizer import advance_schedule
from huatuo_jax.training.state import TrainState, Variables

NUMBERS_OF_TOKENS = (
    "old_log_probs",
    "reference_log_probs",
    "advantages",
    "old_values",
    "returns",
)
"""What a minibatch holds beside its rows, float32 each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """The compiled programs of a model that is trained.

    Attributes:
        run_pass: see `update.compile_pass`.
        apply: see `update.compile_apply`.
    """

    run_pass: OnMesh
    apply: OnMesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
    """What stays the same from one iteration to the next.

    Attributes:
        cfg: the run's settings.
        mesh: where everything lies.
        prompts: what is asked.
        sampler: answers.
        scorer: scores the answers.
        make_targets: see `estimates`.
        policy: its programs.
        reference: takes the place of the policy's trained variables, see `roles.make_reference`.
        critic: where its frozen variables are; None without one.
        value: its programs; None without one.
    """

    cfg: PpoConfig
    mesh: Mesh
    prompts: Prompts
    sampler: Sampler
    scorer: AnswerScorer
    make_targets: MakeTargets
    policy: Learner
    reference: Variables
    critic: Critic | None
    value: Learner | None

    def iterate(self, state: PpoState) -> tuple[PpoState, IterationReport]:
        """The state after one more iteration; the one before is used up."""
        spent = Spent()
        trains_policy = int(state.iteration) >= self.cfg.warmup_iterations
        with spent.on("generation"):
            rollout = self._sample(state)
        with spent.on("scoring"):
            scores_N = np.asarray(self.scorer.scores(rollout.given()), np.float32)
        layouts = [self._layouts(state, rollout, epoch) for epoch in range(self.cfg.num_epochs)]
        with spent.on("log_probs"):
            experience = self._experience(state, rollout, scores_N, layouts[0])
            targets = on_host(self.make_targets(experience, state.kl_coef, state.scores))
        with spent.on("update"):
            rows = self._training_rows(rollout, experience, targets)
            state, sums = self._update(state, rows, layouts, trains_policy=trains_policy)
        report = IterationReport(
            cfg=self.cfg,
            iteration=int(state.iteration) + 1,
            kl_coef=float(state.kl_coef),
            rollout=rollout,
            raw_scores_N=scores_N,
            targets=targets,
            update=sums,
            spent=spent,
        )
        place = jax.NamedSharding(self.mesh, jax.P())
        # Before its first step the policy's KL is 0, which says nothing of the coefficient.
        kl_coef = targets.kl_coef if trains_policy else state.kl_coef
        return dataclasses.replace(
            state,
            iteration=state.iteration + 1,
            next_prompt=state.next_prompt + self.cfg.rollout.num_prompts,
            kl_coef=jax.device_put(kl_coef, place),
            scores=jax.device_put(targets.running, place),
        ), report

    def _sample(self, state: PpoState) -> Rollout:
        first, number = int(state.next_prompt), self.cfg.rollout.num_prompts
        prompts = self.prompts.rows(first, number, seed=self.cfg.seed)
        key = jax.random.fold_in(state.key, state.iteration)
        return self.sampler.sample(state.policy.variables, prompts, key)

    def _layouts(self, state: PpoState, rollout: Rollout, epoch: int) -> list[Layout]:
        """The minibatches of a pass over the rollout."""
        cfg, iteration = self.cfg, int(state.iteration)
        order = permutation(cfg.rollout.num_answers, "rows", cfg.seed, iteration, epoch)
        lengths_N = rollout.rows["segment_ids"].sum(axis=1, dtype=np.int64)
        width = rollout.rows["segment_ids"].shape[1]
        make = functools.partial(plain_layout, width=width)
        if cfg.packed:
            counts = row_counts(
                cfg.minibatch_size, rows_at_once=cfg.rows_at_once, shards=batch_shards(self.mesh)
            )
            make = functools.partial(
                packed_layout, width=cfg.max_length, narrow=width, row_counts=counts
            )
        numbers = np.split(order, cfg.num_minibatches)
        return [make(numbers_n, lengths_N[numbers_n]) for numbers_n in numbers]

    def _experience(
        self,
        state: PpoState,
        rollout: Rollout,
        scores_N: npt.NDArray[np.float32],
        minibatches: Sequence[Layout],
    ) -> Experience:
        """The rollout as the models see it, by the programs of the update.

        In the minibatches of the first pass, so that each of those meets the very numbers it would
        compute itself.
        """
        zeros_NT = np.zeros(rollout.rows["mask"].shape, np.float32)
        found = {
            name: zeros_NT.copy() for name in ("log_probs", "reference", "values", "values_after")
        }
        empty = dict.fromkeys(NUMBERS_OF_TOKENS, zeros_NT)
        for layout in minibatches:
            rows = self._placed(rollout.rows | empty, layout)
            # Of each pass the outputs alone are held: its gradients take as much memory as a model.
            policy = self._policy_pass(state, rows, differentiate=False).outputs
            reference = self._policy_pass(
                state, rows, differentiate=False, trained=self.reference
            ).outputs
            layout.unpack(policy["log_probs"], found["log_probs"])
            layout.unpack(reference["log_probs"], found["reference"])
            if self.value is not None:
                critic = self._value_pass(state, rows, differentiate=False).outputs
                for name, values_BT in critic.items():
                    layout.unpack(values_BT, found[name])
        return Experience(
            token_ids_NT=rollout.rows["token_ids"],
            mask_NT=rollout.rows["mask"],
            old_log_probs_NT=found["log_probs"],
            reference_log_probs_NT=found["reference"],
            sampler_log_probs_NT=rollout.sampler_log_probs_NT,
            raw_scores_N=scores_N,
            values_NT=found["values"],
            values_after_NT=found["values_after"],
        )

    def _training_rows(self, rollout: Rollout, experience: Experience, targets: Targets) -> Rows:
        return rollout.rows | {
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
        """All passes over the rollout, or those up to the bound of the KL.

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
                policy, metrics = self.policy.apply(state.policy, found.sums, found.gradients)
                sums.policy.append(metrics)
                state = dataclasses.replace(state, policy=policy)
                del found  # Its gradients, before the critic makes its own.
            if self.value is not None:
                found = self._value_pass(state, minibatch, differentiate=True)
                assert state.value is not None
                value, metrics = self.value.apply(state.value, found.sums, found.gradients)
                sums.value.append(metrics)
                state = dataclasses.replace(state, value=value)
                del found
        return state, sums.on_host()

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


def _without_updates(state: PpoState, number: int) -> PpoState:
    """The state as it goes on where so many planned updates are not taken."""

    def advanced(part: TrainState) -> TrainState:
        return dataclasses.replace(part, opt_state=advance_schedule(part.opt_state, number))

    return dataclasses.replace(
        state,
        policy=advanced(state.policy),
        value=None if state.value is None else advanced(state.value),
    )
