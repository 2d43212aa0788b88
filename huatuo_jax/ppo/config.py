"""The settings of a PPO stage, and the rules of its judgings: when, what is kept, when to stop.

A policy that is trained long enough against a reward model comes to answers which that model
overrates: its reward keeps rising while what the reward stands for falls (Gao et al. 2022,
arXiv 2210.10760, who find the turn with a gold reward model). Here the judge, whose verdicts the
reward model was trained on, is asked anew about held-out answers of the policy, each paired with
one of the initial policy.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.core.config import operational
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.ppo.rewards import AnswerScoreConfig
from huatuo_jax.training.loop import BaseLoopConfig
from huatuo_jax.training.metrics import JUDGED_PREFIX
from huatuo_jax.training.micro_batch import check_micro_batch_size
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.stage import StageConfig

Estimator = Literal["gae", "rloo", "grpo"]
KlPlace = Literal["reward", "sequence_square", "k3"]
Denominator = Literal["tokens", "max_new_tokens", "answers"]


def _require_positive(name: str, value: float | None, *, whole: bool = False) -> None:
    if value is None:
        return
    fits = value >= 1 if whole else value > 0
    if not (fits and value < float("inf")):
        raise ValueError(f"{name}={value!r} must be {'at least 1' if whole else 'above 0'}")


def _changed(section: Any, *names: str) -> list[str]:
    """Lists the fields (of these, or all) that do not have their default, with their values."""
    return [
        field.name if dataclasses.is_dataclass(value) else f"{field.name}={value!r}"
        for field in dataclasses.fields(section)
        if (not names or field.name in names)
        and (value := getattr(section, field.name)) != field.default
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgingConfig:
    """Judgings of held-out answers: how often, by whom, and when the run stops.

    At each judging the judge compares an answer of the policy with one of the initial policy to
    the same prompt, in both orders. The policy's share of the points (1 for a win, 1/2 for a tie
    or for orders that contradict each other) decides: `ppo/model` holds the policy of the judging
    with the highest share, the earlier one of equal shares.

    The run stops at a judging where both hold: the last `patience` judgings all have a share below
    the best one so far, and the last mean reward is above that of the best judging. Below the best
    alone may be noise, or a policy that gets worse by the reward's own measure, which later
    iterations repair; only where the reward still rises does training move away from what the
    judge prefers. The initial policy counts among the judgings with a share of 1/2, which is what
    it has against itself, so that a run also stops where the judge prefers the initial policy from
    the beginning.

    Attributes:
        every: iterations between two judgings; the last iteration is always judged, those that
            train the critic alone never.
        prompts: file of prompts that no stage trains on; None for the recipe's held-out prompts.
        num_prompts: so many of them, chosen by their content; None for all.
        num_samples: answers of either policy to each prompt.
        patience: judgings in a row below the best one after which the run may stop; None never
            stops it.
        temperature: answers are drawn at; None for that of the rollouts.
        judge: who judges; None for the recipe's judge, of `labels`.
        concurrency: questions under way at once.
        spending: file of what the judge's calls cost; the budget is for all calls in it. None for
            one of the judgings alone, in the recipe for that of the labels.
    """

    every: int = 4
    prompts: str | None = operational(None)
    num_prompts: int | None = 64
    num_samples: int = 1
    patience: int | None = 3
    temperature: float | None = None
    judge: JudgeConfig | None = None
    concurrency: int = operational(8)
    spending: str | None = operational(None)

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        for name in ("every", "num_prompts", "num_samples", "patience", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature!r} must be above 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The sampling of an iteration, with top-p 1 and without top-k.

    Attributes:
        num_prompts: prompts of an iteration.
        answers_per_prompt: answers to each; RLOO and GRPO compare them.
        max_new_tokens: tokens of an answer at most.
        temperature: of sampler, policy and reference alike.
        slots: answers decoded at once; None for as many as are asked for, 64 at most.
        mesh: how the devices of training are divided anew for it, None for as in training. Each
            decode step reads all weights: split over `tensor` they stay where they are, split over
            `fsdp` they are gathered for every token.
    """

    num_prompts: int = 64
    answers_per_prompt: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    slots: int | None = operational(None)
    mesh: MeshConfig | None = operational(None)

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        for name in ("num_prompts", "answers_per_prompt", "max_new_tokens", "slots"):
            _require_positive(name, getattr(self, name), whole=True)
        _require_positive("temperature", self.temperature)

    @property
    def num_answers(self) -> int:
        """Answers of an iteration."""
        return self.num_prompts * self.answers_per_prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(AnswerScoreConfig):
    """From the reward model's score of an answer to its part of the reward.

    Beside the fields of `AnswerScoreConfig`:

    Attributes:
        of: the `reward_model`, or the `length` of an answer in tokens, its end included: the
            control that shows what a policy does that only learns to be longer.
        whiten: divide the rewards of a rollout by their standard deviation over its tokens; their
            mean is not taken off.
    """

    of: Literal["reward_model", "length"] = "reward_model"
    whiten: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for rules that contradict each other."""
        super().__post_init__()
        if self.of == "length" and self.scale == "stored":
            raise ValueError(
                "scale='stored' is the reward model's; a score of='length' takes 'running' or 'raw'"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueConfig:
    """The critic, which `gae` needs and the other estimators lack.

    Attributes:
        start: where its trunk comes from: the `reward` model, the `policy`'s model (a copy), or
            `shared`: the policy's own frozen trunk, with adapters of its own.
        head: `zero`, or `keep` the reward model's, on the scale of the scores: their mean taken off
            and divided by their deviation where `score.scale` is `stored`, as it is where scores
            are `raw`. The scale of `running` scores is not known when the critic is made.
        lora: train these adapters and the head; None trains the whole model.
        optimizer: None for the policy's settings.
        clip: how far a value may move from the old one before its loss is flat; None for no clip.
        warmup_iterations: so many first iterations train the critic alone.
    """

    start: Literal["reward", "policy", "shared"] = "reward"
    head: Literal["zero", "keep"] = "zero"
    lora: LoraConfig | None = None
    optimizer: OptimizerConfig | None = None
    clip: float | None = 0.2
    warmup_iterations: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        if self.head == "keep" and self.start != "reward":
            raise ValueError(f"head='keep' needs start='reward', not {self.start!r}")
        if self.start == "shared" and self.lora is None:
            raise ValueError("start='shared' needs lora: the trunk itself is frozen")
        _require_positive("clip", self.clip)
        if self.warmup_iterations < 0:
            raise ValueError(f"warmup_iterations={self.warmup_iterations!r} must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoLoopConfig(BaseLoopConfig):
    """The loop of PPO, apart from training; no field decides the parameters.

    Attributes:
        checkpoint_every: iterations between two checkpoints; there is always one at the end.
        keep_checkpoints: how many of the newest are kept.
        log_every: iterations between two lines where there is no terminal.
        samples_per_iteration: answers of each iteration that are written to `samples.jsonl`.
        max_not_finite_in_a_row: so many skipped minibatches in a row stop the run.
    """

    checkpoint_every: int = 10
    log_every: int = 1
    samples_per_iteration: int = 8

    _MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ("samples_per_iteration",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PpoConfig(StageConfig):
    """A run of PPO (arXiv 1707.06347, 1909.08593), or of its relatives without a critic.

    Attributes:
        model: the policy to start from, which is the reference too, mostly an SFT model's directory
            (`{workdir}/sft/model` is that of this run). With `lora` policy and reference share the
            frozen weights, the reference being the model without its adapters.
        reward_model: directory of a model with a score head, of the same tokenizer.
        data: the prompts.
        optimizer: of the policy.
        value: the critic.
        rollout: what is sampled.
        score: how answers are rewarded.
        estimator: `gae` with a critic (PPO); `rloo` (arXiv 2402.14740) and `grpo` (arXiv
            2402.03300) compare the answers to a prompt.
        divide_by_deviation: `grpo` as published, which also has `denominator='answers'`; without
            it, the gradient of `rloo` but for a factor.
        gamma: discount of `gae`; the other estimators have none.
        gae_lambda: of `gae`; 1 for no trust in the critic.
        whiten_advantages: `gae`'s advantages get mean 0 and variance 1 over the rollout.
        kl_coef: weight of the KL penalty, the first one where it adapts.
        kl_in: `reward` takes it off each token's reward (k1); `sequence_square` and `k3` put it
            into the loss, the latter with another optimum, see `ppo.rewards`.
        target_kl_per_sequence: in nats of a whole answer: the coefficient adapts to it.
        kl_gain: how fast it does; not while the critic alone is trained.
        clip_low: of the policy's ratio.
        clip_high: of the policy's ratio.
        dual_clip: bound of the ratio where the advantage is negative.
        entropy_coef: weight of the entropy bonus.
        denominator: what the losses of a step are divided by: its `tokens`, all of which weigh the
            same (DAPO, arXiv 2503.14476); `max_new_tokens` for each answer, however long it is
            (Dr. GRPO, arXiv 2503.20783); or its `answers`, each of which is the mean over its own
            tokens, so that a token of a short answer weighs more (GRPO as published, arXiv
            2402.03300, equation 3).
        num_iterations: rollouts in all.
        num_epochs: passes over each rollout.
        num_minibatches: optimizer steps of a pass.
        stop_at_kl: the passes over a rollout end before a step whose minibatch has a larger
            approximate KL (k3, nats a token) from the policy that sampled; None for no bound. The
            schedules of the learning rates count the steps that are left out.
        micro_batch_size: rows that go through a model at once, on all devices together; `auto`
            for as many as fit the devices' memory with every model of the run (a whole minibatch
            on CPU), None for a whole minibatch.
        packed: lay several answers of a minibatch into a row, which changes rounding only.
        compute: how a pass is computed.
        loop: checkpoints, logging.
        judging: held-out answers go to the judge anew every few iterations, the policy that it
            likes best is kept, and the run stops where it turns; None for none of that: the last
            policy is kept.
    """

    reward_model: str = operational("{workdir}/reward/model")
    data: PromptsConfig
    value: ValueConfig = ValueConfig()
    rollout: RolloutConfig = RolloutConfig()
    score: ScoreConfig = ScoreConfig()
    estimator: Estimator = "gae"
    divide_by_deviation: bool = True
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True
    kl_coef: float = 0.03
    kl_in: KlPlace = "reward"
    target_kl_per_sequence: float | None = None
    kl_gain: float = 0.1
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    denominator: Denominator = "tokens"
    num_iterations: int = 100
    num_epochs: int = 3
    num_minibatches: int = 1
    stop_at_kl: float | None = None
    packed: bool = operational(True)
    loop: PpoLoopConfig = operational(PpoLoopConfig())
    judging: JudgingConfig | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range, or contradicting settings."""
        for name in ("num_iterations", "num_epochs", "num_minibatches"):
            _require_positive(name, getattr(self, name), whole=True)
        for name in ("target_kl_per_sequence", "stop_at_kl", "clip_high"):
            _require_positive(name, getattr(self, name))
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be between 0 and 1")
        for name in ("kl_coef", "entropy_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r} must be 0 or more")
        if not 0 < self.clip_low < 1:
            raise ValueError(f"clip_low={self.clip_low!r} must be above 0 and below 1")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip!r} must be above 1")
        if not 0 < self.kl_gain < 5:
            raise ValueError(f"kl_gain={self.kl_gain!r} must be above 0 and below 5")
        self._check_sizes()
        self._check_estimator()
        self._check_unused()
        self._check_kept_head()

    def _check_sizes(self) -> None:
        answers = self.rollout.num_answers
        if answers % self.num_minibatches:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} must divide the {answers} answers of an "
                "iteration (rollout.num_prompts * rollout.answers_per_prompt)"
            )
        rows = self.minibatch_size
        check_micro_batch_size(self.micro_batch_size, rows, name=f"the {rows} rows of a minibatch")

    def _check_estimator(self) -> None:
        if self.has_critic:
            if self.value.start == "shared" and self.model.lora is None:
                raise ValueError("value.start='shared' needs model.lora: the trunk must be frozen")
            if self.value.warmup_iterations >= self.num_iterations:
                raise ValueError(
                    f"value.warmup_iterations={self.value.warmup_iterations} must be below "
                    f"num_iterations={self.num_iterations}: the policy would never be trained"
                )
            return
        if self.rollout.answers_per_prompt < 2:
            raise ValueError(f"estimator={self.estimator!r} needs rollout.answers_per_prompt >= 2")
        if self.score.on_truncation == "bootstrap":
            raise ValueError("score.on_truncation='bootstrap' needs a critic: estimator='gae'")

    def _check_unused(self) -> None:
        """Raises ValueError for fields that are set and that other fields leave without a use."""
        unused: list[tuple[str, list[str]]] = []
        if not self.has_critic:
            found = _changed(self, "gamma", "gae_lambda", "whiten_advantages")
            unused.append((f"estimator={self.estimator!r}", found))
        if self.estimator != "grpo":
            found = _changed(self, "divide_by_deviation")
            unused.append((f"estimator={self.estimator!r}", found))
        if self.target_kl_per_sequence is None:
            unused.append(("target_kl_per_sequence=None", _changed(self, "kl_gain")))
        if self.kl_coef == 0:  # It is multiplied, and stays 0.
            unused.append(("kl_coef=0.0", _changed(self, "target_kl_per_sequence")))
        if self.num_epochs * self.num_minibatches == 1:  # The first step's KL is 0.
            unused.append(("a rollout of one step", _changed(self, "stop_at_kl")))
        for reason, names in unused:
            if names:
                raise ValueError(f"{reason} has no use for {', '.join(names)}: leave it out")

    @property
    def without_use(self) -> str | None:
        """The fields of the critic's section that are not used, in a line; None where it is.

        They are not refused: another estimator may be tried on a card that describes a critic.
        """
        names = [] if self.has_critic else [f"value.{name}" for name in _changed(self.value)]
        return f"estimator={self.estimator!r} has no use for {', '.join(names)}" if names else None

    def _check_kept_head(self) -> None:
        """Raises ValueError where rewards have another scale than the reward model's head."""
        if not self.has_critic or self.value.head != "keep":
            return
        score = self.score
        for name, fits, right in (
            ("of", score.of == "reward_model", "of='reward_model'"),
            ("scale", score.scale != "running", "scale='stored' or 'raw'"),
            ("whiten", not score.whiten, "whiten=False"),
        ):
            if not fits:
                raise ValueError(
                    f"value.head='keep' needs score.{right}, not {getattr(score, name)!r}: the "
                    "head is on the scale of the reward model's scores"
                )

    @property
    def has_critic(self) -> bool:
        """True where there is a value model."""
        return self.estimator == "gae"

    @property
    def minibatch_size(self) -> int:
        """Rows of an optimizer step."""
        return self.rollout.num_answers // self.num_minibatches

    @property
    def rows_of_update(self) -> int:
        """Rows of an optimizer step, on all devices together."""
        return self.minibatch_size

    @property
    def max_length(self) -> int:
        """Tokens of a prompt and an answer at most."""
        return self.data.max_prompt_tokens + self.rollout.max_new_tokens

    @property
    def warmup_iterations(self) -> int:
        """First iterations that leave the policy as it is."""
        return self.value.warmup_iterations if self.has_critic else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """Outcome of a judging; the initial policy's is iteration 0.

    Attributes:
        iteration: whose policy was judged.
        share: of the points against the initial policy.
        share_low: of its 95 % interval over prompts.
        share_high: of its 95 % interval over prompts.
        reward: mean over the same answers of what the reward holds of the reward model's score.
        kl_per_sequence: mean log-ratio to the reference of the same answers, in nats.
        length: mean tokens of an answer.
        pairs: of answers with a verdict, equal answers (ties, which nobody is asked about) too.
        failed: pairs without a verdict, which count nowhere.
        cost: of the verdicts; None where there is no price.
    """

    iteration: int
    share: float
    share_low: float
    share_high: float
    reward: float
    kl_per_sequence: float
    length: float
    pairs: int
    failed: int
    cost: float | None

    def __str__(self) -> str:
        """Describes it in one line."""
        if not self.iteration:
            return f"initial policy, held-out answers: reward {self.reward:.3f}"
        failed = f", {self.failed} failed" if self.failed else ""
        return (
            f"judged: {self.share:.3f} [{self.share_low:.3f}, {self.share_high:.3f}] of the points "
            f"against the initial policy ({self.pairs} pairs{failed}), "
            f"reward {self.reward:.3f}, KL {self.kl_per_sequence:.3f}, length {self.length:.1f}"
        )

    def fields(self) -> dict[str, float]:
        """Returns the numbers for `metrics.jsonl`."""
        numbers = dataclasses.asdict(self)
        del numbers["iteration"]
        return {
            f"{JUDGED_PREFIX}{name}": value for name, value in numbers.items() if value is not None
        }


def is_due(cfg: JudgingConfig, iteration: int, *, warmup: int, last: int) -> bool:
    """Tells whether the policy after so many iterations is to be judged.

    Args:
        cfg: how often.
        iteration: 0 for the initial policy.
        warmup: first iterations that leave the policy as it is.
        last: iterations in all.
    """
    if iteration == 0:
        return True
    return iteration > warmup and (iteration % cfg.every == 0 or iteration == last)


def best_of(history: Sequence[Judged]) -> Judged:
    """Returns the judging with the highest share, the earliest of equal ones."""
    return max(history, key=lambda one: (one.share, -one.iteration))


def kept_of(history: Sequence[Judged]) -> Judged | None:
    """Returns the best judging of a policy that was trained; None before there is one."""
    trained = [one for one in history if one.iteration]
    return best_of(trained) if trained else None


def has_turned(history: Sequence[Judged], *, patience: int | None) -> bool:
    """Tells whether the judge has turned while the reward still rises, see `JudgingConfig`.

    Args:
        history: all judgings in order, the initial policy's first.
        patience: judgings in a row that have to be below the best one.
    """
    best, last = best_of(history), history[-1]
    if patience is None or len(history) <= patience:
        return False
    below = all(one.share < best.share for one in history[-patience:])
    return below and last.reward > best.reward


def outcome(history: Sequence[Judged], *, turned: bool) -> dict[str, Any]:
    """Returns the judgings' part of the result: which policy was kept, and why the run ended."""
    kept, best, last = kept_of(history), best_of(history), history[-1]
    assert kept is not None, "the last iteration is always judged"
    ended = "all iterations"
    if turned:
        ended = (
            f"the judge turned at iteration {last.iteration} while the reward rose from "
            f"{best.reward:.3f} to {last.reward:.3f}"
        )
    return {
        "kept_iteration": kept.iteration,
        "kept_share": kept.share,
        "kept_share_low": kept.share_low,
        "kept_share_high": kept.share_high,
        "best_is_initial": best.iteration == 0,
        "ended": ended,
    }


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """Reads a history as a checkpoint holds it: the fields of each judging."""
    return [Judged(**row) for row in rows]
