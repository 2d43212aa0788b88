"""Calls reward functions for an iteration's responses, some while others are still sampled."""

import asyncio
import concurrent.futures
import inspect
import math
import threading
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from huatuo_jax.judge.judgements import JudgeUnusable
from huatuo_jax.reward_functions.functions import Call, is_async
from huatuo_jax.reward_functions.grader import Grader

T = TypeVar("T")
Messages = Sequence[Mapping[str, str]]


class Asked(NamedTuple):
    """Responses and all that a reward function may read, one of each for a response.

    Attributes:
        prompts: messages with `role` and `content`.
        responses: texts.
        columns: by name.
    """

    prompts: Sequence[Messages]
    responses: Sequence[str]
    columns: Mapping[str, Sequence[Any]]

    def one(self, place: int) -> "Asked":
        """Returns what is asked about one response."""
        columns = {name: [values[place]] for name, values in self.columns.items()}
        return Asked([self.prompts[place]], [self.responses[place]], columns)


class Background:
    """An event loop in a thread of its own, in which all coroutine functions run."""

    def __init__(self) -> None:
        """Starts nothing before the first coroutine."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def start(self, coroutine: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        """Starts a coroutine."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=self._loop.run_forever, name="reward functions", daemon=True
            )
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Ends the loop; what still runs in it is cancelled."""
        if self._loop is None or self._thread is None:
            return
        self.start(_cancel_others()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._loop = self._thread = None


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class RewardCalls:
    """The functions of a reward, called iteration by iteration.

    `begin`, then `take` for each response as it is finished, then `results`. What was not taken is
    called for in `results`.

    Attributes:
        background: where coroutine functions run.
    """

    def __init__(self, calls: Mapping[str, Call], *, grader: Grader | None) -> None:
        """Calls nothing yet.

        Args:
            calls: that `functions.check` passed, by the names of their terms.
            grader: that they ask; None for none.
        """
        self._calls, self._grader = calls, grader
        self._one_by_one = {name: one for name, one in calls.items() if one.is_one_by_one}
        self.background = Background()
        self._taken: dict[int, dict[str, concurrent.futures.Future[float | None]]] = {}

    @property
    def takes(self) -> bool:
        """Tells whether `take` begins anything."""
        return bool(self._one_by_one)

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the iteration's questions, see `Grader.counts`; empty without a judge."""
        return {} if self._grader is None else dict(self._grader.counts)

    def begin(self, name: str) -> None:
        """Begins with other responses.

        Args:
            name: of the iteration, by which verdicts that did not come are kept.
        """
        self._taken = {}
        if self._grader is not None:
            self._grader.begin(name)

    def take(self, place: int, asked: Asked) -> None:
        """Starts the functions that are called one by one for a response.

        Args:
            place: of the response among those of `results`.
            asked: about this response alone.
        """
        self._taken[place] = {
            name: self.background.start(call_one(call, asked))
            for name, call in self._one_by_one.items()
        }

    def wait(self) -> None:
        """Waits for what was taken, all responses being finished.

        Raises:
            ValueError: a function failed, or the judge can answer nothing any more.
        """
        if self._grader is not None:
            self.background.start(_started(self._grader)).result()
        for found in self._taken.values():
            for future in found.values():
                future.result()

    def results(self, asked: Asked) -> dict[str, list[float | None]]:
        """Returns the rewards by the names of the terms.

        Args:
            asked: about all responses, in the order of the places of `take`.

        Raises:
            ValueError: as `call_all` and `wait`.
        """
        for place in range(len(asked.responses)):
            if place not in self._taken and self._one_by_one:
                self.take(place, asked.one(place))
        self.wait()
        found: dict[str, list[float | None]] = {
            name: [self._taken[place][name].result() for place in range(len(asked.responses))]
            for name in self._one_by_one
        }
        others = {name: one for name, one in self._calls.items() if name not in found}
        called = call_all(list(others.values()), asked, self.background)
        return found | dict(zip(others, called, strict=True))

    def close(self) -> None:
        """Waits for the judge's calls under way, which are paid for, and ends."""
        if self._grader is not None:
            self.background.start(self._grader.close()).result()
        self.background.close()


async def _started(grader: Grader) -> None:
    grader.start_clock()


def call_all(
    calls: Sequence[Call], asked: Asked, background: Background
) -> list[list[float | None]]:
    """Calls all functions, the coroutine functions among them at once.

    Args:
        calls: of functions that `check` passed.
        asked: what they are given.
        background: where coroutine functions run.

    Returns:
        The rewards of each, one a response.

    Raises:
        ValueError: a function raised, or gave something else than a list of as many numbers and
            None as there are responses.
    """
    found: list[Any] = [None] * len(calls)
    waiting = [n for n, call in enumerate(calls) if is_async(call.function)]
    for number, call in enumerate(calls):
        if number not in waiting:
            found[number] = _called(call, asked)
    if waiting:
        rewards = background.start(_gathered([calls[n] for n in waiting], asked)).result()
        for number, values in zip(waiting, rewards, strict=True):
            found[number] = values
    return [_checked(call, values, asked) for call, values in zip(calls, found, strict=True)]


async def call_one(call: Call, asked: Asked) -> float | None:
    """Calls a `one_by_one` function for one response.

    Raises:
        ValueError: as `call_all`.
    """
    (found,) = await _gathered([call], asked)
    (reward,) = _checked(call, found, asked)
    return reward


def _arguments(call: Call, asked: Asked) -> dict[str, Any]:
    """The keyword arguments of a call: columns that it takes, and its settings."""
    parameters = inspect.signature(call.function).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    columns = {
        name: list(values)
        for name, values in asked.columns.items()
        if takes_all or name in parameters
    }
    # A column that none of these prompts has is one of None.
    without = [None] * len(asked.responses)
    absent = {
        one.name: list(without)
        for one in parameters.values()
        if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD) and one.default is one.empty
    }
    whole = {"prompts": list(asked.prompts), "responses": list(asked.responses)}
    services = {name: call.services[name] for name in call.wants}
    return absent | columns | whole | dict(call.settings) | services


def _failed(call: Call, error: Exception) -> ValueError:
    if isinstance(error, JudgeUnusable):  # It says by itself what is to be done.
        return error
    return ValueError(f"{call.name}: raised {type(error).__name__}: {error}")


def _called(call: Call, asked: Asked) -> Any:
    try:
        return call.function(**_arguments(call, asked))
    except Exception as error:
        raise _failed(call, error) from error


async def _gathered(calls: Sequence[Call], asked: Asked) -> list[Any]:
    found = await asyncio.gather(
        *(call.function(**_arguments(call, asked)) for call in calls), return_exceptions=True
    )
    for call, one in zip(calls, found, strict=True):
        if isinstance(one, Exception):
            raise _failed(call, one) from one
        if isinstance(one, BaseException):
            raise one
    return found


def _checked(call: Call, values: Any, asked: Asked) -> list[float | None]:
    """Returns a function's rewards as numbers and None."""
    number = len(asked.responses)
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        raise ValueError(
            f"{call.name}: returned {type(values).__name__}; it should be a list of {number} "
            "numbers or None"
        )
    if len(values) != number:
        raise ValueError(
            f"{call.name}: returned {len(values)} rewards for {number} responses; it should be "
            "one each, None where it does not apply"
        )
    return [_number(call, index, one) for index, one in enumerate(values)]


def _number(call: Call, index: int, value: Any) -> float | None:
    if value is None:
        return None
    is_number = hasattr(value, "__float__") and not isinstance(value, str | bytes)
    if not is_number or not math.isfinite(found := float(value)):
        raise ValueError(
            f"{call.name}: returned {value!r} for response {index}; it should be a number, or "
            "None where it does not apply"
        )
    return found
