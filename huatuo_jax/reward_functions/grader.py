"""A judge that reward functions ask while responses are sampled; what it said is kept on disk.

A question is the messages to the judge, so that the same response, rubric and judge are one
question. Each of its replies is kept by question and attempt: a run that was killed reads them and
pays for none twice. A question without a verdict in an iteration (no attempt came through, or the
time was over) has none in that iteration's repetition either, so that a run which is resumed goes
through the same rewards; the next iteration asks it anew. Calls that were under way when a process
was killed at once are lost, at most `concurrency` of them; they stand in the spending file as calls
without an end.
"""

import asyncio
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from huatuo_jax.core.config import operational
from huatuo_jax.core.files import AppendedFile, as_path
from huatuo_jax.data.records import Prompt
from huatuo_jax.judge.chat import ChatMessages, ChatModel, ChatModelConfig, ChatReply
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.judge.judgements import Judge, JudgeUnusable
from huatuo_jax.judge.offline import SCALE, open_offline
from huatuo_jax.judge.openai import OpenAIJudgeConfig, read_judge_prompt
from huatuo_jax.judge.replies import BadReply, check_ending, parse_score
from huatuo_jax.judge.server import Server

T = TypeVar("T")
Key = tuple[str, int]
"""Of a reply: the question's hash and the attempt's number."""

REPLIES_FILE = "replies.jsonl"
SPENDING_FILE = "replies.jsonl.spending.jsonl"
_LATE = "late"
_DIGITS = 32  # Of a question's hash.


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraderConfig:
    """The judge that reward functions ask, and what becomes of questions without a verdict.

    A budget (`judge.max_cost`, `judge.max_requests`) that is spent stops the run; with a larger one
    it resumes.

    Attributes:
        judge: a model behind a server; or an offline judge, which gives scores and answers no
            other questions.
        temperatures: of the attempts at a question. A reply of the wrong form is asked again at
            the next one; after the last there is no verdict. HuatuoGPT-3 has these.
        concurrency: calls under way at once.
        timeout_s: seconds that an iteration waits for verdicts once it has nothing else to do; None
            for as long as they take.
        on_timeout: what becomes of questions that have no verdict by then: they get `no_verdict`,
            as those whose replies have the wrong form, so that the term does not apply; or the run
            will `stop`. Calls under way are waited for in the background and kept either way.
    """

    judge: JudgeConfig = JudgeConfig()
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4)
    concurrency: int = operational(8)
    timeout_s: float | None = operational(None)
    on_timeout: Literal["no_verdict", "stop"] = "no_verdict"

    def __post_init__(self) -> None:
        """Raises ValueError for a number out of its range."""
        if not self.temperatures:
            raise ValueError("temperatures=() must hold one for each attempt")
        for one in self.temperatures:
            if not 0 <= one < math.inf:
                raise ValueError(f"temperatures={self.temperatures!r} must be 0 or above")
        if self.concurrency < 1:
            raise ValueError(f"concurrency={self.concurrency!r} must be at least 1")
        if self.timeout_s is not None and not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s={self.timeout_s!r} must be above 0, or None")

    def models(self, judge: OpenAIJudgeConfig, *, key: str) -> list[ChatModel]:
        """Returns the judge as it is asked at each attempt."""
        return [
            ChatModel(
                ChatModelConfig(
                    model=judge.model,
                    server=judge.server,
                    max_tokens=judge.max_tokens,
                    temperature=temperature,
                    json_object=judge.structured != "none",
                    prices=judge.prices,
                    concurrency=self.concurrency,
                ),
                key=key,
            )
            for temperature in self.temperatures
        ]


class _Round:
    """The questions of one iteration.

    Attributes:
        name: of the iteration.
        ended: set when its time is over.
        counts: of its questions by what became of them.
    """

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self.name, self.counts = name, counts
        self.ended = asyncio.Event()


class Grader:
    """Asks the judge; its coroutines run in one event loop, `functions.Background`."""

    def __init__(
        self,
        cfg: GraderConfig,
        folder: str | os.PathLike[str],
        *,
        server: OpenAIJudgeConfig | None,
        key: str | None,
    ) -> None:
        """Reads the replies that are there; sends nothing.

        Args:
            cfg: how it is asked.
            folder: of the files of replies and spending.
            server: the judge behind a server; None for an offline one.
            key: for the server.

        Raises:
            ValueError: files of another kind, or a budget of money for a model without a price.
        """
        self._cfg, self.path = cfg, as_path(folder) / REPLIES_FILE
        self.server = server
        self._score_prompt = read_judge_prompt("score")
        self._models: list[ChatModel] = []
        self._asked: Server | None = None
        self._file: AppendedFile | None = None
        # Where in the file a reply stands: the texts of a long run would fill the memory.
        self._places: dict[Key, int] = {}
        self._without: set[tuple[str, str]] = set()  # Iteration and question.
        self._under_way: dict[Key, asyncio.Task[ChatReply | None]] = {}
        self._wanted = Counter[Key]()
        self._slots = asyncio.Semaphore(cfg.concurrency)
        self._round = _Round("", Counter())
        self._closing = False
        if server is None:
            return
        assert key is not None
        self._models = cfg.models(server, key=key)
        self._file = AppendedFile(self.path, locked=True)
        try:
            self._read(self._file)
            self._file.cut_unfinished()
            self._asked = self._models[0].open_server(self.path.with_name(SPENDING_FILE))
        except BaseException:
            self._file.close()
            raise

    @property
    def counts(self) -> Mapping[str, int]:
        """Of the iteration: its `questions`, replies of the `wrong_form`, those `without_verdict`.

        They are the same where an iteration is repeated, whatever was paid for before.
        """
        names = ("questions", "wrong_form", "without_verdict")
        return {name: self._round.counts[name] for name in names}

    def begin(self, name: str) -> None:
        """Begins an iteration, or more questions of the same."""
        again = name == self._round.name
        self._round = _Round(name, self._round.counts if again else Counter())

    def start_clock(self) -> None:
        """Ends the iteration's time `timeout_s` from now; in the event loop."""
        if self._cfg.timeout_s is not None:
            asyncio.get_running_loop().call_later(self._cfg.timeout_s, self._round.ended.set)

    async def ask(
        self, messages: Sequence[Mapping[str, str]], read: Callable[[str], T]
    ) -> T | None:
        """Asks a question, again where a reply has the wrong form.

        Args:
            messages: to the judge; what it grades in them is quoted.
            read: from the text of a reply to the verdict; raises BadReply for the wrong form.

        Returns:
            The verdict; None where there is none, which is no low one.

        Raises:
            JudgeUnusable: the judge can answer nothing any more (no money, key, model or server),
                or the time is over and the run is to stop; what came before is kept.
            ValueError: there is no server to ask.
        """
        if not self._models:
            raise ValueError(
                "the offline judge gives scores alone: set reward.grader.judge.base_url to ask a "
                "model"
            )
        now, chat = self._round, tuple(messages)
        question = self._models[0].hash(chat)[:_DIGITS]
        now.counts["questions"] += 1
        found: T | None = None
        if (now.name, question) not in self._without:
            found = await self._attempts(now, question, chat, read)
        now.counts["without_verdict"] += found is None
        return found

    async def score(self, prompt: Prompt, answer: str, criterion: str) -> float | None:
        """Asks for a judge's score of an answer, as for AI feedback; an offline judge too.

        Args:
            prompt: with what the judge is to know.
            answer: the text that is judged.
            criterion: which score.

        Returns:
            The score, brought to 0 (worst) to 1 (best); None where there is no verdict.

        Raises:
            JudgeUnusable: as `ask`.
        """
        if self.server is None:
            cfg = self._cfg.judge
            offline: Judge = open_offline(cfg.offline_for([prompt]), cfg.clinic_judge)
            scores = (await offline.score(prompt, answer)).scores
            assert scores is not None
            return (scores[criterion] - SCALE[0]) / (SCALE[1] - SCALE[0])
        low, high = self.server.low, self.server.high
        messages = self._score_prompt.render(
            prompt, [answer], low=low, high=high, require_reference=False
        )

        def read(reply: str) -> float:
            return (parse_score(reply, low=low, high=high).scores[criterion] - low) / (high - low)

        return await self.ask(messages, read)

    async def close(self) -> None:
        """Waits for calls under way, sends nothing more, and closes the files."""
        self._closing = True
        if self._under_way:
            await asyncio.wait(list(self._under_way.values()))
        if self._asked is not None:
            await self._asked.close()
        if self._file is not None:
            self._file.close()

    async def _attempts(
        self, now: _Round, question: str, messages: ChatMessages, read: Callable[[str], T]
    ) -> T | None:
        for attempt in range(len(self._models)):
            reply = await self._reply(now, (question, attempt), messages)
            if reply is None or reply.text is None:
                told = {"failure": _LATE} if reply is None else reply._asdict()
                self._keep_without(now, question, {"attempt": attempt} | told)
                return None
            try:
                check_ending(reply.finish_reason)
                return read(reply.text)
            except BadReply:
                now.counts["wrong_form"] += 1
        return None

    async def _reply(self, now: _Round, key: Key, messages: ChatMessages) -> ChatReply | None:
        """Returns what is kept or comes; None where nothing comes in the iteration's time."""
        if key in self._places:
            return self._kept(self._places[key])
        self._wanted[key] += 1
        if key not in self._under_way:
            self._under_way[key] = asyncio.ensure_future(self._fetch(now, key, messages))
            self._under_way[key].add_done_callback(_retrieved)
        task = self._under_way[key]
        over = asyncio.ensure_future(now.ended.wait())
        try:
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.cancel()
            self._wanted[key] -= 1
        if task.done():
            return task.result()
        if self._cfg.on_timeout == "stop":
            raise JudgeUnusable(
                f"{now.name}: the judge has not answered {self._cfg.timeout_s:g} s after the last "
                f"response (reward.grader.timeout_s); its replies so far are in {self.path}: run "
                "the same command again to resume"
            )
        return None

    async def _fetch(self, now: _Round, key: Key, messages: ChatMessages) -> ChatReply | None:
        """Asks for a reply and keeps it; None where nobody wants it when its turn comes."""
        question, attempt = key
        try:
            async with self._slots:
                if self._closing or not self._wanted[key]:
                    return None
                assert self._asked is not None and self._file is not None
                reply, row = await self._models[attempt].complete(self._asked, messages)
            if _is_kept(reply):
                place = {"question": question, "attempt": attempt, "iteration": now.name}
                self._places[key] = self._file.size()
                self._file.append([place | row])
            return reply
        except JudgeUnusable as error:
            raise JudgeUnusable(
                f"{error}; the replies so far are in {self.path}: run the same command again to "
                "resume"
            ) from error
        finally:
            del self._under_way[key]

    def _keep_without(self, now: _Round, question: str, row: Mapping[str, Any]) -> None:
        """Notes that a question has no verdict in an iteration."""
        assert self._file is not None
        if (now.name, question) in self._without or self._closing:
            return
        self._without.add((now.name, question))
        self._file.append([{"question": question, "iteration": now.name, **row}])

    def _kept(self, place: int) -> ChatReply:
        """Returns the reply that stands at a place of the file."""
        assert self._file is not None
        return _reply_of(self._file.row_at(place))

    def _read(self, file: AppendedFile) -> None:
        end = 0
        for line in file.lines():
            row, place, end = line.row, end, line.end
            question, iteration = row.get("question"), row.get("iteration")
            if not isinstance(question, str) or not isinstance(iteration, str):
                raise ValueError(
                    f"{file.path}, line {line.number}: this is no reply of a judge (question and "
                    "iteration are missing)"
                )
            if _is_kept(_reply_of(row)):
                self._places[question, int(row.get("attempt", 0))] = place
            else:
                self._without.add((iteration, question))


def _retrieved(task: asyncio.Task[ChatReply | None]) -> None:
    """Takes note of an error that nobody may wait for any more, which asyncio would print."""
    if not task.cancelled():
        task.exception()


def _reply_of(row: Mapping[str, Any]) -> ChatReply:
    return ChatReply(**{name: row.get(name) for name in ChatReply._fields})


def _is_kept(reply: ChatReply) -> bool:
    """Tells whether a question is not asked again: it was answered or refused."""
    return reply.text is not None or reply.failure == "refused"
