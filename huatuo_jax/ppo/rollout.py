"""Samples answers of the policy as rows of tokens, and scores them."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.generation import weights
from huatuo_jax.generation.buckets import bucket_of, row_lengths
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.requests import Answer, FinishReason, Request, SamplingConfig, slots_for
from huatuo_jax.ppo.config import RolloutConfig
from huatuo_jax.ppo.prompts import TokenPrompt
from huatuo_jax.training.scoring import GivenAnswer, padded_batch
from huatuo_jax.training.update import Variables

_MOST_SLOTS = 64  # Where a config does not say.

OnAnswer = Callable[[int, Answer], None]
"""Told the place of an answer among all, and the answer."""


class AnswerScorer(Protocol):
    """Whatever gives answers their scores: `scoring.Scorer` with a reward model, or a table."""

    def scores(self, answers: Sequence[GivenAnswer]) -> npt.NDArray[np.float32]:
        """Scores each answer, from its token ids."""


class Sampled(NamedTuple):
    """The parts of an answer that a reward reads.

    Attributes:
        token_ids: as sampled, a stop token included.
        finish_reason: `stop` or `length`.
    """

    token_ids: Sequence[int]
    finish_reason: FinishReason


def given_answers(
    prompts: Sequence[TokenPrompt], answers: Sequence[Sampled | Answer]
) -> list[GivenAnswer]:
    """Lays each prompt and its answer end to end, as they were sampled."""
    return [
        GivenAnswer(
            np.array((*prompt.token_ids, *answer.token_ids), np.int32), len(prompt.token_ids)
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


class LengthScorer:
    """An answer's length in tokens, its end included, and nothing else: a control."""

    def scores(self, answers: Sequence[GivenAnswer]) -> npt.NDArray[np.float32]:
        """Counts the tokens of each answer."""
        lengths = [len(one.token_ids) - one.prompt_length for one in answers]
        return np.array(lengths, np.float32)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Answers of the policy, those to one prompt in a row.

    Attributes:
        prompts: one for each group of answers.
        answers: as sampled.
        rows: `token_ids`, `segment_ids`, `positions` and `mask` (answers' tokens), each `[N, T]`.
        sampler_log_probs_NT: as the sampler computed them.
    """

    prompts: Sequence[TokenPrompt]
    answers: Sequence[Answer]
    rows: dict[str, npt.NDArray[Any]]
    sampler_log_probs_NT: npt.NDArray[np.float32]

    @property
    def num_tokens(self) -> int:
        """Of prompts and answers."""
        return int(self.rows["segment_ids"].sum())

    @property
    def num_answer_tokens(self) -> int:
        """Of answers."""
        return int(self.rows["mask"].sum())

    def prompt_of(self, answer: int) -> TokenPrompt:
        """Returns the prompt of an answer."""
        return self.prompts[answer // (len(self.answers) // len(self.prompts))]

    def given(self) -> list[GivenAnswer]:
        """Prompts and answers for a scorer: the ids that were sampled, never tokenised again."""
        return given_answers(self.prompt_of_each, self.answers)

    @property
    def prompt_of_each(self) -> list[TokenPrompt]:
        """The prompt of each answer."""
        return [self.prompt_of(index) for index in range(len(self.answers))]


class Sampler:
    """Lets a policy answer prompts; holds an engine, which holds no weights in between.

    Attributes:
        sampling: how an answer of a rollout is drawn.
    """

    def __init__(
        self,
        model: Transformer,
        cfg: RolloutConfig,
        *,
        stop_token_ids: Sequence[int],
        max_length: int,
        mesh: Mesh,
    ) -> None:
        """Compiles nothing before the first `sample`.

        Args:
            model: the policy's.
            cfg: how much is sampled, and how.
            stop_token_ids: what ends an answer.
            max_length: tokens of prompt and answer.
            mesh: where it generates, see `mesh_of`.
        """
        self._model, self._cfg, self._mesh = model, cfg, mesh
        self._max_length = max_length
        self._lengths = row_lengths(max_length)
        self.sampling = SamplingConfig(
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            stop_token_ids=tuple(stop_token_ids),
        )
        self._engine: Engine | None = None

    def sample(
        self,
        variables: Variables,
        prompts: Sequence[TokenPrompt],
        key: jax.Array,
        on_answer: OnAnswer | None = None,
    ) -> Rollout:
        """Samples the policy's answers.

        Args:
            variables: the policy's, on a mesh of the same devices; what generation holds of them
                is let go of again when the answers are there.
            prompts: one for each group.
            key: with a prompt's place and an answer's index it decides the answer.
            on_answer: see `answers`.
        """
        seeds = np.asarray(jax.random.bits(key, (len(prompts),), jnp.uint32)).tolist()
        requests = [
            Request(
                prompt_token_ids=prompt.token_ids,
                sampling=self.sampling,
                seed=seed,
                num_answers=self._cfg.answers_per_prompt,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        groups = self.answers(variables, requests, on_answer)
        answers = [answer for group in groups for answer in group]
        return self.lay(prompts, answers)

    def lay(self, prompts: Sequence[TokenPrompt], answers: Sequence[Answer]) -> Rollout:
        """Lays prompts and their answers in rows, see `make_rollout`."""
        return make_rollout(prompts, answers, lengths=self._lengths)

    def answers(
        self,
        variables: Variables,
        requests: Sequence[Request],
        on_answer: OnAnswer | None = None,
    ) -> list[list[Answer]]:
        """Samples answers to each request, in order; holds on to none of the weights.

        Args:
            variables: the policy's.
            requests: for answers.
            on_answer: is called with each answer as it is finished, and its place among all.
        """
        before = [0, *itertools.accumulate(one.num_answers for one in requests)]

        def done(answer: Answer) -> None:
            if on_answer is not None:
                on_answer(before[answer.request_index] + answer.answer_index, answer)

        engine = self._load(variables)
        groups = engine.generate_in_order(requests, done)
        engine.unload()
        return groups

    def _load(self, variables: Variables) -> Engine:
        if self._engine is not None:
            self._engine.load(variables)
            return self._engine
        self._engine = Engine(
            self._model,
            variables,
            slots=slots_of(self._cfg, self._mesh),
            max_length=self._max_length,
            mesh=self._mesh,
        )
        return self._engine


def mesh_of(cfg: RolloutConfig, training: Mesh, backbone: BackboneConfig) -> Mesh:
    """Returns the mesh of generation: that of training, or its devices divided anew.

    Raises:
        ValueError: the mesh of the config does not divide the devices or the model.
    """
    if cfg.mesh is None:
        return training
    return weights.mesh_for(backbone, cfg.mesh, training, field="config.ppo.rollout.mesh")


def slots_of(cfg: RolloutConfig, mesh: Mesh | None) -> int:
    """Answers of a rollout that are decoded at once."""
    return slots_for(cfg.slots or min(cfg.num_answers, _MOST_SLOTS), mesh)


def make_rollout(
    prompts: Sequence[TokenPrompt], answers: Sequence[Answer], *, lengths: tuple[int, ...]
) -> Rollout:
    """Lays prompts and answers end to end, padded on the right.

    Args:
        prompts: one for each group.
        answers: groups of the same size, one after the other.
        lengths: of rows, so that few programs are compiled; the smallest that holds all is taken.
    """
    group = len(answers) // len(prompts)
    prompt_lengths_N = np.repeat([len(one.token_ids) for one in prompts], group)
    lengths_N = prompt_lengths_N + [len(one.token_ids) for one in answers]
    width = bucket_of(int(lengths_N.max()), lengths)
    ids_NT = np.zeros((len(answers), width), np.int32)
    log_probs_NT = np.zeros((len(answers), width), np.float32)
    for row, answer in enumerate(answers):
        start, end = prompt_lengths_N[row], lengths_N[row]
        ids_NT[row, :start] = prompts[row // group].token_ids
        ids_NT[row, start:end] = answer.token_ids
        log_probs_NT[row, start:end] = answer.log_probs
    batch = padded_batch(
        jnp.asarray(ids_NT),
        prompt_lengths_B=jnp.asarray(prompt_lengths_N, jnp.int32),
        lengths_B=jnp.asarray(lengths_N, jnp.int32),
    )
    rows = {name: np.asarray(batch[name]) for name in ("token_ids", "segment_ids", "positions")}
    rows["mask"] = np.asarray(batch["trained_mask"])
    return Rollout(prompts, answers, rows, log_probs_NT)
