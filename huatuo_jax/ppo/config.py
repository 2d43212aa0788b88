"""The settings of a PPO stage."""

import dataclasses
from typing import Any, ClassVar, Literal

from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.core.config import operational
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.ppo.held_out_config import HeldOutRewardsConfig
from huatuo_jax.ppo.judging import JudgingConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.ppo.ptx import PtxConfig
from huatuo_jax.ppo.reward_terms import RewardMixConfig
from huatuo_jax.ppo.rewards import AnswerScoreConfig
from huatuo_jax.training.loop import BaseLoopConfig
from huatuo_jax.training.micro_batch import check_micro_batch_size
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.stage import StageConfig

Estimator = Literal["gae", "rloo", "grpo", "reinforce", "reinforce_group"]
Ratio = Literal["token", "sequence"]
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
class RolloutConfig:
    """The sampling of an iteration, with top-p 1 and without top-k.

    Attributes:
        num_prompts: prompts of an iteration.
        answers_per_prompt: answers to each; RLOO and GRPO compare them.
        redraw_rounds: a group whose answers all have the same reward, which teaches a comparison
            nothing, is replaced by one to the next prompt, in so many rounds at most (dynamic
            sampling, DAPO, arXiv 2503.14476, section 3.2); groups that are still equal stay.
        max_new_tokens: tokens of an answer at most.
        temperature: of sampler, policy and reference alike.
        slots: answers decoded at once; None for as many as are asked for, 64 at most.
        mesh: how the devices of training are divided anew for it, None for as in training. Each
            decode step reads all weights: split over `tensor` they stay where they are, split over
            `fsdp` they are gathered for every token.
    """

    num_prompts: int = 64
    answers_per_prompt: int = 1
    redraw_rounds: int = 0
    max_new_tokens: int = 256
    temperature: float = 1.0
    slots: int | None = operational(None)
    mesh: MeshConfig | None = operational(None)

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        for name in ("num_prompts", "answers_per_prompt", "max_new_tokens", "slots"):
            _require_positive(name, getattr(self, name), whole=True)
        _require_positive("temperature", self.temperature)
        if self.redraw_rounds < 0:
            raise ValueError(f"redraw_rounds={self.redraw_rounds!r} must be 0 or more")
        if self.redraw_rounds and self.answers_per_prompt < 2:
            raise ValueError(
                f"redraw_rounds={self.redraw_rounds} needs answers_per_prompt >= 2: one answer "
                "alone has nothing that it could be equal to"
            )

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
class ReferenceSyncConfig:
    """A reference that follows the policy (arXiv 2404.09656; `sync_ref_model` of TRL).

    Attributes:
        every: iterations between two moves (`ref_model_sync_steps`).
        mixup_alpha: the next reference is mixup_alpha * policy + (1 - mixup_alpha) * reference
            (`ref_model_mixup_alpha`): with 1 a copy of the policy; below, with every=1, the
            exponential moving average of its weights.
    """

    every: int
    mixup_alpha: float = 0.6

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        _require_positive("every", self.every, whole=True)
        if not 0 < self.mixup_alpha <= 1:
            raise ValueError(f"mixup_alpha={self.mixup_alpha!r} must be above 0 and at most 1")

    @property
    def copies(self) -> bool:
        """True where the policy takes the reference's place."""
        return self.mixup_alpha == 1


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
        reward: what the rewards are summed from, in place of `score.of`: the reward model,
            functions of your own, verifiers; None for `score.of` alone. `score.scale='stored'` is
            then of the reward model's term.
        estimator: `gae` with a critic (PPO); `rloo` (arXiv 2402.14740) and `grpo` (arXiv
            2402.03300) compare the answers to a prompt; `reinforce` is REINFORCE++ (arXiv
            2501.03262), what is still to come at each token, and `reinforce_group` takes the mean
            of the prompt's answers off it (REINFORCE++-baseline); both are whitened.
        divide_by_deviation: `grpo` as published, which also has `denominator='answers'`; without
            it, the gradient of `rloo` but for a factor.
        gamma: discount of `gae` and of both `reinforce`; the other estimators have none.
        gae_lambda: of `gae`; 1 for no trust in the critic.
        whiten_advantages: advantages of `gae` and of both `reinforce` get mean 0 and variance 1
            over the rollout.
        ratio: what is clipped, and what weighs a token: its own ratio, or the `sequence`'s, the
            geometric mean over its tokens (GSPO, arXiv 2507.18071, which has
            `denominator='answers'`, clip_low 3e-4 and clip_high 4e-4).
        sampler_ratio_cap: multiply each token's advantage by min(policy / sampler, cap), for the
            gap between the probabilities of the sampler and those of the trainer (truncated
            importance sampling; 2 is usual); None for no weights.
        kl_coef: weight of the KL penalty, the first one where it adapts.
        kl_in: `reward` takes it off each token's reward (k1); `sequence_square` and `k3` put it
            into the loss, the latter with another optimum, see `ppo.rewards`.
        target_kl_per_sequence: in nats of a whole answer: the coefficient adapts to it.
        kl_gain: how fast it does; not while the critic alone is trained.
        reference_sync: move the reference towards the policy every few iterations; every KL is then
            that from where it is. None leaves it where the policy began.
        clip_low: of the policy's ratio.
        clip_high: of the policy's ratio.
        dual_clip: bound of the ratio where the advantage is negative.
        entropy_coef: weight of the entropy bonus.
        trains_on_truncated: whether answers without an end are in the loss; without them they are
            still in the means of their group and of the rollout (overlong filtering, DAPO).
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
        stop_at_total_kl: the run ends after an iteration whose answers have this mean KL from the
            reference or more (k1, nats of a whole answer): the distance that it may spend in all.
            None for no budget.
        micro_batch_size: rows of a prompt and an answer each that go through a model at once, on
            all devices together; `auto` for as many as fit the devices' memory with every model of
            the run (a whole minibatch on CPU), None for a whole minibatch.
        packed: lay several answers of a minibatch into a row, which changes rounding only. Rows are
            as long as several of the longest answers where those are short, up to 1,024 tokens, and
            a micro-batch has as many fewer of them.
        compute: how a pass is computed.
        loop: checkpoints, logging.
        judging: held-out answers go to the judge anew every few iterations, the policy that it
            likes best is kept, and the run stops where it turns; None for none of that: the last
            policy is kept.
        ptx: the loss of fine-tuning on dialogues, added to the policy's (PPO-ptx); None for none.
        held_out_rewards: held-out answers are rewarded every few iterations, and the policy with
            the highest measure is kept; in place of `judging`. None for none of that.
    """

    reward_model: str = operational("{workdir}/reward/model")
    data: PromptsConfig
    value: ValueConfig = ValueConfig()
    rollout: RolloutConfig = RolloutConfig()
    score: ScoreConfig = ScoreConfig()
    reward: RewardMixConfig | None = None
    estimator: Estimator = "gae"
    divide_by_deviation: bool = True
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: bool = True
    ratio: Ratio = "token"
    sampler_ratio_cap: float | None = None
    kl_coef: float = 0.03
    kl_in: KlPlace = "reward"
    target_kl_per_sequence: float | None = None
    kl_gain: float = 0.1
    reference_sync: ReferenceSyncConfig | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    trains_on_truncated: bool = True
    denominator: Denominator = "tokens"
    num_iterations: int = 100
    num_epochs: int = 3
    num_minibatches: int = 1
    stop_at_kl: float | None = None
    stop_at_total_kl: float | None = None
    packed: bool = operational(True)
    loop: PpoLoopConfig = operational(PpoLoopConfig())
    judging: JudgingConfig | None = None
    ptx: PtxConfig | None = None
    held_out_rewards: HeldOutRewardsConfig | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range, or contradicting settings."""
        for name in ("num_iterations", "num_epochs", "num_minibatches"):
            _require_positive(name, getattr(self, name), whole=True)
        for name in (
            "target_kl_per_sequence",
            "stop_at_kl",
            "stop_at_total_kl",
            "clip_high",
            "sampler_ratio_cap",
        ):
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
        self._check_reward()
        self._check_held_out()
        self._check_reference()
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
        if self.estimator != "reinforce" and self.rollout.answers_per_prompt < 2:
            raise ValueError(f"estimator={self.estimator!r} needs rollout.answers_per_prompt >= 2")
        if self.score.on_truncation == "bootstrap":
            raise ValueError("score.on_truncation='bootstrap' needs a critic: estimator='gae'")

    def _check_reward(self) -> None:
        """Raises ValueError for settings of the reward that contradict each other."""
        mix = self.reward
        if mix is None:
            return
        if self.score.of != "reward_model":
            raise ValueError(
                f"score.of={self.score.of!r} has no use beside reward: make it one of its terms"
            )
        if mix.combine == "sum_of_normalised" and self.rollout.answers_per_prompt < 2:
            raise ValueError(
                "reward.combine='sum_of_normalised' needs rollout.answers_per_prompt >= 2"
            )
        if not mix.has_model and self.has_critic and self.value.start == "reward":
            raise ValueError(
                "value.start='reward' needs a reward model, which is no term of reward: "
                "value.start='policy' or 'shared', or an estimator without a critic"
            )

    def _check_held_out(self) -> None:
        """Raises ValueError where two measures would keep a policy, or one that there is not."""
        if self.held_out_rewards is None:
            return
        if self.judging is not None:
            raise ValueError("held_out_rewards must be None beside judging: one of them keeps")
        terms = () if self.reward is None else tuple(one.label for one in self.reward.terms)
        measure = self.held_out_rewards.measure
        if measure not in ("reward", *terms):
            raise ValueError(
                f"held_out_rewards.measure={measure!r} must be one of {['reward', *terms]}"
            )

    def _check_reference(self) -> None:
        """Raises ValueError for settings that need a reference that stays."""
        if self.reference_sync is None:
            return
        if self.stop_at_total_kl is not None:
            raise ValueError(
                "stop_at_total_kl must be None with reference_sync: a reference that moves does "
                "not tell how far the policy has come in all"
            )
        if self.judging is not None:
            raise ValueError(
                "judging must be None with reference_sync: it compares with the initial policy, "
                "which is a reference that stays; use held_out_rewards"
            )
        if self.model.lora is not None and not self.reference_sync.copies:
            raise ValueError(
                f"reference_sync.mixup_alpha={self.reference_sync.mixup_alpha!r} must be 1 with "
                "model.lora: a mean of two adapters' factors is not that of what they add"
            )

    @property
    def needs_reward_model(self) -> bool:
        """True where a reward model is opened: for rewards or for the critic."""
        starts_critic = self.has_critic and self.value.start == "reward"
        return self.reward is None or self.reward.has_model or starts_critic

    @property
    def scores_by_model(self) -> bool:
        """True where the reward model scores answers."""
        if self.reward is not None:
            return self.reward.has_model
        return self.score.of == "reward_model"

    def _check_unused(self) -> None:
        """Raises ValueError for fields that are set and that other fields leave without a use."""
        unused: list[tuple[str, list[str]]] = []
        if not self.has_critic:
            found = _changed(self, "gae_lambda")
            if not self.estimator.startswith("reinforce"):
                found += _changed(self, "gamma", "whiten_advantages")
            unused.append((f"estimator={self.estimator!r}", found))
        if self.estimator != "grpo":
            found = _changed(self, "divide_by_deviation")
            unused.append((f"estimator={self.estimator!r}", found))
        if self.target_kl_per_sequence is None:
            unused.append(("target_kl_per_sequence=None", _changed(self, "kl_gain")))
        if self.kl_coef == 0:  # It is multiplied, and stays 0.
            unused.append(
                ("kl_coef=0.0", _changed(self, "target_kl_per_sequence", "reference_sync"))
            )
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
            ("of", self.reward is None and score.of == "reward_model", "of='reward_model'"),
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
