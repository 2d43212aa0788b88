"""Answers requests of the engines: admits them, attends to them while their client is there."""

import asyncio
import contextlib
import functools
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from openai.types import CompletionUsage
from starlette.requests import Request as HttpRequest

from huatuo_jax.generation.requests import Answer, Request
from huatuo_jax.serving.calls import Call, Update
from huatuo_jax.serving.errors import ApiError
from huatuo_jax.serving.exchange import attended
from huatuo_jax.serving.metrics import Metrics
from huatuo_jax.serving.models import Policy, Served
from huatuo_jax.serving.runner import Runner, ServedEngine

Result = TypeVar("Result")

_LONGEST_RETRY_S = 60


class Head(NamedTuple):
    """The fields that all parts of a response share."""

    id: str
    created: int
    model: str

    @classmethod
    def of(cls, policy: Policy, kind: str) -> "Head":
        """Makes them for a new response, whose id begins with its kind."""
        return cls(f"{kind}-{uuid.uuid4().hex}", int(time.time()), policy.name)


class Answering:
    """Answers calls with the engines of the served models.

    Attributes:
        served: the models.
        runner: the thread that has the devices.
    """

    def __init__(self, served: Served, *, max_waiting: int) -> None:
        """Starts nothing yet.

        Args:
            served: the models.
            max_waiting: answers that wait for a slot of a model before more are refused.
        """
        self.served, self._max_waiting = served, max_waiting
        self.metrics = Metrics(list(served.policies.values()))
        self._policies = {one.engine: one for one in served.policies.values()}
        self.runner = Runner([*self._policies], self._updated)
        # One at a time: a tokenizer is not safe to use in several threads.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._answer_s, self._scoring = 1.0, 0

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Runs work of a tokenizer beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    def begin(self, policy: Policy, requests: Sequence[Request]) -> tuple[Call, Callable[[], None]]:
        """Has requests answered; returns the call, and what must be called at its end.

        Raises:
            ApiError: too many answers are waiting, or the engine is dead.
        """
        engine = policy.engine
        if engine.waiting >= self._max_waiting and engine.unfinished:
            raise ApiError(
                429,
                f"{engine.waiting} answers are waiting, and no more than {self._max_waiting} may",
                code="queue_full",
                retry_after_s=self._retry_after_s(engine),
            )
        call = Call(requests)
        self.runner.submit(engine, call)
        self.metrics.started(policy, call)
        return call, functools.partial(self._finish, policy, call)

    async def score(self, work: Callable[[], Result]) -> Result:
        """Runs scoring between two steps of the engines.

        Raises:
            ApiError: too much of it is waiting, or the engine is dead.
        """
        if self._scoring >= self._max_waiting:
            raise ApiError(
                429,
                f"{self._scoring} calls for scores are waiting, and no more may",
                code="queue_full",
                retry_after_s=1,
            )
        self._scoring += 1
        try:
            return await self.runner.run(work)
        finally:
            self._scoring -= 1

    @contextlib.asynccontextmanager
    async def answering(
        self, http: HttpRequest, policy: Policy, requests: Sequence[Request]
    ) -> AsyncIterator[Call]:
        """Has requests answered, as long as the client is there; errors as of `begin`."""
        call, finish = self.begin(policy, requests)
        try:
            async with attended(http, call):
                yield call
        finally:
            finish()

    def _finish(self, policy: Policy, call: Call) -> None:
        if not call.remaining and call in policy.engine.calls:
            self._answer_s += (time.perf_counter() - call.started_s - self._answer_s) / 8
        self.runner.finish(policy.engine, call)
        self.metrics.finished(policy, call)

    def _updated(self, engine: ServedEngine, call: Call, update: Update) -> None:
        self.metrics.updated(self._policies[engine], call, update)

    def _retry_after_s(self, engine: ServedEngine) -> int:
        """Returns about how long the answers that wait have to."""
        seconds = math.ceil(self._answer_s * engine.waiting / engine.slots)
        return max(1, min(seconds, _LONGEST_RETRY_S))


def require_finite(answer: Answer) -> None:
    """Raises ApiError for an answer of a model whose logits are not finite."""
    if not all(map(math.isfinite, answer.log_probs)):
        raise ApiError(
            500,
            "the model's log-probabilities are not finite; its weights are broken, or its dtype "
            "too narrow",
        )


def usage_of(prompts: Sequence[Sequence[int]], num_generated: int) -> CompletionUsage:
    """Returns the tokens of a response, a prompt's counted once for all of its answers."""
    num_prompt = sum(map(len, prompts))
    return CompletionUsage(
        prompt_tokens=num_prompt,
        completion_tokens=num_generated,
        total_tokens=num_prompt + num_generated,
    )
