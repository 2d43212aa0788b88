"""The models of a PPO run: policy, reference, critic and reward model, of one architecture kind."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.lora import init_adapters
from huatuo_jax.backbone.matmul import store_as_computed
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint import models
from huatuo_jax.core.sharding import batch_shards
from huatuo_jax.generation.buckets import row_lengths
from huatuo_jax.hf.config import read_json
from huatuo_jax.hf.generation_config import CONFIG_FILE
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.ppo.config import PpoConfig, ScoreConfig
from huatuo_jax.ppo.rewards import ScoreScale
from huatuo_jax.training.initial_model import InitialModel, ModelConfig, open_model
from huatuo_jax.training.optimizer import Optimizer
from huatuo_jax.training.scoring import GivenAnswer, Normalization, Scorer, load_normalization
from huatuo_jax.training.update import (
    TrainState,
    Variables,
    abstract,
    join,
    make_sharded,
    new_state,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Folded into the run's key, beside the roles of `training.initial_model`.
_CRITIC_ADAPTERS_ROLE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A model on disk that scores answers; its weights are not read before `make_scorer`.

    Attributes:
        info: of its directory.
        normalization: of its scores; None where raw ones are wanted.
    """

    info: models.ModelInfo
    normalization: Normalization | None

    @property
    def identity(self) -> str:
        """A hash of its files."""
        return models.fingerprint(self.info.folder)

    def normalization_outside_training(self, cfg: ScoreConfig) -> Normalization | None:
        """Returns the normalization of its scores by the rule that holds outside of training.

        It is there for `running` scores too, where it was stored; None for raw ones.
        """
        if cfg.of == "length" or cfg.scale == "raw":
            return None
        return load_normalization(self.info.folder)

    def make_scorer(
        self,
        compute: ComputeConfig,
        mesh: Mesh,
        *,
        rows_at_once: int,
        row_length: int | Sequence[int],
    ) -> Scorer:
        """Loads the model to its devices, stored as it computes."""
        params = models.load_params(self.info, mesh=mesh, dtype=compute.param_dtype)
        variables = store_as_computed({"params": params}, compute.compute_dtype)
        return Scorer(
            Transformer(self.info.cfg, compute),
            variables,
            mesh=mesh,
            rows_at_once=rows_at_once,
            row_length=row_length,
        )


def open_reward_model(
    directory: str,
    *,
    scale: ScoreScale,
    max_length: int,
    tokenizer: "PreTrainedTokenizerBase",
) -> RewardModel:
    """Finds a reward model and checks that it can score what the policy samples.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it has no score head, other tokens, too few positions, or no normalization
            where one is wanted.
    """
    name = "config.ppo.reward_model"
    info = models.find_model(directory)
    if info.head != "score":
        raise ValueError(f"{name}={directory}: this model has no score head")
    if info.cfg.max_positions < max_length:
        raise ValueError(
            f"{name}={directory} has {info.cfg.max_positions} positions, fewer than the "
            f"{max_length} of a prompt and an answer"
        )
    others = load_tokenizer(info.folder).get_vocab().items() ^ tokenizer.get_vocab().items()
    if others:
        raise ValueError(
            f"{name}={directory}: its tokenizer and the policy's differ in {len(others)} tokens, "
            "so it cannot score the policy's token ids"
        )
    normalization = None
    if scale == "stored":
        normalization = load_normalization(info.folder)
        if normalization is None:
            raise ValueError(
                f"{name}={directory} holds no normalization of its scores; train it with the "
                "reward stage, or set config.ppo.score.scale to 'running' or 'raw'"
            )
    return RewardModel(info=info, normalization=normalization)


_VERIFIER_ROWS = 8  # A shard of the mesh has so many texts at once.


class ModelVerifier:
    """A model on its devices that tells whether texts are right; see `graded.Verifier`."""

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        end: Sequence[int],
        max_length: int,
    ) -> None:
        """Takes the model.

        Args:
            scorer: with its score head.
            tokenizer: its own.
            end: tokens after each text.
            max_length: tokens of a text at most, with its end.
        """
        self._scorer, self._tokenizer = scorer, tokenizer
        self._end, self._max_length = end, max_length

    def probabilities(self, texts: Sequence[str]) -> list[float | None]:
        """Returns 1 / (1 + exp(-score)) of each text and its end; None for one that is too long."""
        ids = [[*self._tokenizer(text)["input_ids"], *self._end] for text in texts]
        fits = [len(one) <= self._max_length for one in ids]
        given = [
            GivenAnswer(np.array(one, np.int32), 0)
            for one, fit in zip(ids, fits, strict=True)
            if fit
        ]
        scores = iter(self._scorer.scores(given).tolist() if given else [])
        return [1 / (1 + math.exp(-next(scores))) if fit else None for fit in fits]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifierModel:
    """A model on disk that tells whether an answer is right.

    A classifier of two labels, as HuatuoGPT-o1's in Hugging Face format, has one score: the
    difference of its logits, so that 1 / (1 + exp(-score)) is what softmax gives the second label.

    Attributes:
        info: of its directory.
        tokenizer: its own.
        end: tokens after a text; the score is that of the last token.
    """

    info: models.ModelInfo
    tokenizer: "PreTrainedTokenizerBase"
    end: Sequence[int]

    @property
    def identity(self) -> str:
        """A hash of its files."""
        return models.fingerprint(self.info.folder)

    def open(self, compute: ComputeConfig, mesh: Mesh) -> ModelVerifier:
        """Loads the model to its devices."""
        length = self.info.cfg.max_positions
        scorer = RewardModel(info=self.info, normalization=None).make_scorer(
            compute,
            mesh,
            rows_at_once=_VERIFIER_ROWS * batch_shards(mesh),
            row_length=row_lengths(length),
        )
        return ModelVerifier(scorer, self.tokenizer, end=self.end, max_length=length)


def open_verifier(directory: str) -> VerifierModel:
    """Finds a model that tells whether an answer is right.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it has no score head, or its tokenizer no end token.
    """
    name = "config.ppo.reward.verifier_model"
    info = models.find_model(directory)
    if info.head != "score":
        raise ValueError(f"{name}={directory}: this model has no score head")
    tokenizer = load_tokenizer(info.folder)
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(f"{name}={directory}: its tokenizer has no end token")
    # transformers takes the score of the last token that is no padding.
    is_padding = info.form == "hugging_face" and end == read_json(info.folder / CONFIG_FILE).get(
        "pad_token_id"
    )
    return VerifierModel(info=info, tokenizer=tokenizer, end=() if is_padding else (end,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critic:
    """A critic to start from.

    Attributes:
        model: with a score head.
        shares_trunk: the policy's frozen trunk is its own too; it has adapters and a head.
        head_scale: the head of `model` is multiplied by it, with 0 for values that start at 0.
        head_offset: added to what the head gives, all through the run; the head has no bias.
    """

    model: InitialModel
    shares_trunk: bool
    head_scale: float
    head_offset: float = 0.0

    def make_state(self, key: jax.Array, optimizer: Optimizer, mesh: Mesh) -> TrainState:
        """Makes the state before the first step, in its shards."""
        if self.shares_trunk:
            return make_sharded(lambda key: self._on_shared_trunk(key, optimizer), mesh, key)
        state = self.model.make_state(key, optimizer, mesh)
        params = state.trained["params"]
        kernel = params["score_head"]["kernel"]
        # Not times 0, which would leave minus signs.
        kernel = kernel * self.head_scale if self.head_scale else jnp.zeros_like(kernel)
        trained = state.trained | {"params": params | {"score_head": {"kernel": kernel}}}
        return dataclasses.replace(state, trained=trained)

    def abstract_state(self, optimizer: Optimizer, mesh: Mesh) -> TrainState:
        """Returns that state's shapes and shardings."""
        if self.shares_trunk:
            key = jax.random.key(0)
            return abstract(lambda key: self._on_shared_trunk(key, optimizer), mesh, key)
        return self.model.abstract_state(optimizer, mesh)

    def frozen(self, own: Variables, policy_frozen: Variables) -> Variables:
        """Returns its frozen variables, the policy's trunk among them where it is shared."""
        return join(own, policy_frozen) if self.shares_trunk else own

    def _on_shared_trunk(self, key: jax.Array, optimizer: Optimizer) -> TrainState:
        cfg, adapters = self.model.cfg, self.model.section.lora
        assert adapters is not None
        role = jax.random.fold_in(key, _CRITIC_ADAPTERS_ROLE)
        kernel = jnp.zeros((cfg.hidden_size, 1), self.model.compute.param_dtype)
        variables: Variables = {
            "params": {"score_head": {"kernel": kernel}},
            "lora": init_adapters(role, cfg, adapters),
        }
        return new_state(variables, is_trained=lambda path: True, optimizer=optimizer, key=key)


def open_critic(cfg: PpoConfig, policy: InitialModel, reward: RewardModel | None) -> Critic | None:
    """Opens the critic that a config describes; None for estimators without one.

    Args:
        cfg: the run's config.
        policy: the policy to start from.
        reward: the reward model; None where something else gives the scores.

    Raises:
        ValueError: the critic is to start from a reward model and there is none.
    """
    if not cfg.has_critic:
        return None
    scale, offset = 0.0, 0.0
    if cfg.value.start == "reward":
        if reward is None:
            raise ValueError("value.start='reward' needs a reward model")
        section = ModelConfig(directory=str(reward.info.folder), lora=cfg.value.lora)
        if cfg.value.head == "keep":
            # Scores are normalised or, without a normalization, raw: as the head gives them.
            found, scale = reward.normalization, 1.0
            if found is not None:
                scale = 1.0 / found.standard_deviation
                offset = -found.mean / found.standard_deviation
    else:
        section = dataclasses.replace(cfg.model, lora=cfg.value.lora, freeze_embeddings=False)
    model = open_model(section, policy.compute, head="score")
    return Critic(
        model=model,
        shares_trunk=cfg.value.start == "shared",
        head_scale=scale,
        head_offset=offset,
    )
