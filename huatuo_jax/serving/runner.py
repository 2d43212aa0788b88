"""One thread that has the devices: it steps the engines and runs other work between two steps.

Everything that touches a device runs there, so that two programs with collectives never wait for
each other. The event loop gets what a step gave in one call.
"""

import asyncio
import concurrent.futures
import logging
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.requests import Request, SamplingConfig
from huatuo_jax.serving.calls import Call, Growing, Update
from huatuo_jax.serving.errors import ApiError

Result = TypeVar("Result")
_log = logging.getLogger(__name__)

_FAILED = "the model failed on this request"
_DEAD = "the engine has failed, and the server has to be started anew"


class _Job(NamedTuple):
    """A request of a call."""

    call: Call
    prompt: int

    @property
    def request(self) -> Request:
        return self.call.requests[self.prompt]


def log_error(error: BaseException, *, doing: str) -> None:
    """Logs where an error was raised, without its message, which may hold a user's text."""
    places = traceback.extract_tb(error.__traceback__)
    trace = " < ".join(f"{one.filename}:{one.lineno} {one.name}" for one in reversed(places))
    _log.error("%s while %s: %s", type(error).__name__, doing, trace)


class ServedEngine:
    """An engine and the requests that it answers.

    After a step that failed, its requests are tried again in halves, until those are found that
    fail by themselves; the others have the answers that they would have had, as a request and its
    seed decide them.

    Attributes:
        slots: answers that are decoded at once.
        calls: that are waiting or under way; the event loop's.
        dead: the engine fails whatever it is asked.
    """

    def __init__(self, engine: Engine, *, slots: int) -> None:
        """Takes an idle engine.

        Args:
            engine: that answers.
            slots: its number of them.
        """
        self.engine, self.slots = engine, slots
        self.calls: set[Call] = set()
        self.dead = False
        self._jobs: dict[int, _Job] = {}
        self._remaining: dict[int, int] = {}
        self._suspects: deque[list[_Job]] = deque()

    @property
    def unfinished(self) -> int:
        """Returns the number of answers that are waiting or under way."""
        return sum(call.remaining for call in self.calls)

    @property
    def waiting(self) -> int:
        """Returns the number of answers that wait for a slot."""
        return max(0, self.unfinished - self.slots)

    @property
    def running(self) -> int:
        """Returns the number of answers under way."""
        return min(self.unfinished, self.slots)

    def probe(self) -> None:
        """Generates one token; raises what the engine raises."""
        sampling = SamplingConfig(max_new_tokens=1, temperature=0.0)
        request = Request(prompt_token_ids=[0, 0], sampling=sampling)
        self.engine.submit(request)
        try:
            while self.engine.busy:
                self.engine.step()
        except BaseException:
            self.engine.reset()
            raise

    # The rest runs in the thread.

    @property
    def busy(self) -> bool:
        """Returns True while there is something to do."""
        return bool(self._jobs or self._suspects)

    def take(self, call: Call) -> bool:
        """Begins with the requests of a call; returns False where the engine is dead."""
        if self.dead:
            return False
        jobs = [_Job(call, number) for number in range(len(call.requests))]
        if self._suspects:
            self._suspects.append(jobs)
        else:
            self._submit(jobs)
        return True

    def drop(self, call: Call) -> None:
        """Forgets the requests of a call, whose slots are free for the next step."""
        for index in [index for index, job in self._jobs.items() if job.call is call]:
            self.engine.abort(index)
            del self._jobs[index], self._remaining[index]
        groups = [[job for job in group if job.call is not call] for group in self._suspects]
        self._suspects = deque(group for group in groups if group)

    def step(self) -> tuple[list[tuple[Call, Update]], list[Call]]:
        """Runs one round; returns the updates, and the calls that have failed."""
        if not self._jobs:
            self._submit(self._suspects.popleft())
        try:
            answers = self.engine.step()
            running = self.engine.running
        except Exception as error:
            log_error(error, doing="running the engine")
            return [], self._after_failure()
        updates = [
            (job.call, Update(job.prompt, one.answer_index, Growing(one, len(one.token_ids))))
            for one in running
            if one.token_ids
            for job in (self._jobs[one.request_index],)
        ]
        for answer in answers:
            job = self._jobs[answer.request_index]
            updates.append((job.call, Update(job.prompt, answer.answer_index, answer)))
            self._remaining[answer.request_index] -= 1
            if not self._remaining[answer.request_index]:
                del self._jobs[answer.request_index], self._remaining[answer.request_index]
        return updates, []

    def give_up(self) -> list[Call]:
        """Takes no more requests; returns the calls that have failed thereby."""
        self.dead = True
        jobs = [*self._jobs.values(), *(job for group in self._suspects for job in group)]
        self._jobs.clear()
        self._suspects.clear()
        return list(dict.fromkeys(job.call for job in jobs))

    def _submit(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            index = self.engine.submit(job.request)
            self._jobs[index], self._remaining[index] = job, job.request.num_answers

    def _after_failure(self) -> list[Call]:
        """Sets the failed requests aside in halves; returns the call of one that fails alone."""
        jobs = list(self._jobs.values())
        self.engine.reset()
        self._jobs.clear()
        self._remaining.clear()
        if len(jobs) > 1:
            half = len(jobs) // 2
            self._suspects.extendleft((jobs[half:], jobs[:half]))
            return []
        try:
            self.probe()
        except Exception as error:
            log_error(error, doing="trying the engine after a failure")
            return [jobs[0].call, *self.give_up()]
        self.drop(jobs[0].call)
        return [jobs[0].call]


class Runner:
    """The thread, and the calls from the event loop to it."""

    def __init__(
        self,
        engines: Sequence[ServedEngine],
        on_update: Callable[[ServedEngine, Call, Update], object],
    ) -> None:
        """Takes the engines, which belong to the thread from its start on.

        Args:
            engines: to step in turn.
            on_update: called in the event loop for each update of an answer that is new.
        """
        self._engines, self._on_update = tuple(engines), on_update
        self._commands: queue.SimpleQueue[Callable[[], bool]] = queue.SimpleQueue()
        self._work: deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; called in the event loop that gets the updates."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step; calls that have not ended fail."""
        self._commands.put(lambda: False)
        self._thread.join()
        for engine in self._engines:
            for call in engine.calls:
                call.fail(ApiError(503, "the server is shutting down"))

    @property
    def is_dead(self) -> bool:
        """Returns True where the thread has ended, or an engine fails whatever it is asked."""
        return not self._thread.is_alive() or any(engine.dead for engine in self._engines)

    def submit(self, engine: ServedEngine, call: Call) -> None:
        """Has a call answered; `finish` must follow.

        Raises:
            ApiError: the engine is dead.
        """
        if engine.dead or not self._thread.is_alive():
            raise ApiError(503, _DEAD)
        engine.calls.add(call)
        self._command(self._take, engine, call)

    def finish(self, engine: ServedEngine, call: Call) -> None:
        """Frees what a call has of the engine; an unfinished one is dropped."""
        engine.calls.discard(call)
        if call.remaining:
            self._command(engine.drop, call)

    async def run(self, work: Callable[[], Result]) -> Result:
        """Runs a function in the thread, between two steps; raises what it raises."""
        if not self._thread.is_alive():
            raise ApiError(503, _DEAD)
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._command(self._work.append, (future, work))
        return await asyncio.wrap_future(future)

    def _command(self, function: Callable[..., object], *arguments: Any) -> None:
        def command() -> bool:
            function(*arguments)
            return True

        self._commands.put(command)

    # The rest runs in the thread.

    def _run(self) -> None:
        try:
            while self._obey():
                for engine in self._engines:
                    if engine.busy:
                        updates, failed = engine.step()
                        self._tell(engine, updates, failed)
                if self._work:
                    self._do(*self._work.popleft())
        except BaseException as error:
            log_error(error, doing="running the engine's thread")
            for engine in self._engines:
                self._tell(engine, [], engine.give_up())
            raise SystemExit from error  # Its traceback might hold a user's text.

    def _obey(self) -> bool:
        """Runs the commands that have come, waiting for one if there is nothing to do."""
        busy = bool(self._work) or any(engine.busy for engine in self._engines)
        while True:
            try:
                command = self._commands.get(block=not busy)
            except queue.Empty:
                return True
            if not command():
                return False
            busy = True

    def _take(self, engine: ServedEngine, call: Call) -> None:
        if not engine.take(call):
            self._tell(engine, [], [call])

    def _do(self, future: concurrent.futures.Future[Any], work: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    def _tell(
        self, engine: ServedEngine, updates: list[tuple[Call, Update]], failed: list[Call]
    ) -> None:
        if updates or failed:
            words = _DEAD if engine.dead else _FAILED
            status = 503 if engine.dead else 500
            cast(asyncio.AbstractEventLoop, self._loop).call_soon_threadsafe(
                self._deliver, engine, updates, failed, ApiError(status, words)
            )

    # In the event loop.

    def _deliver(
        self,
        engine: ServedEngine,
        updates: list[tuple[Call, Update]],
        failed: list[Call],
        error: ApiError,
    ) -> None:
        for call, update in updates:
            if call.put(update):
                self._on_update(engine, call, update)
        for call in failed:
            call.fail(error)
