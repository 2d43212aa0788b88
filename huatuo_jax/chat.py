"""A conversation in the terminal, with a model on this machine or behind a server."""

import contextlib
import dataclasses
import difflib
import importlib
import os
import pathlib
import secrets
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol, cast

import openai
import rich.console
import rich.markup
import rich.table

from huatuo_jax.api.in_use import Delta, Settings
from huatuo_jax.api.models import Model, SamplingFields, load_model, open_reward_model
from huatuo_jax.core.config import Text
from huatuo_jax.core.markdown import plain
from huatuo_jax.data.records import Message, Messages, is_empty
from huatuo_jax.judge.judgements import printable
from huatuo_jax.judge.server import KEY_VARIABLE, scrubbed

_NO_LIST = (404, 405, 501)  # Statuses of a server that does not list its models.
_SEEDS = 1 << 32
_PROMPT = "> "
_INTERRUPTED = 130  # The exit code after Ctrl-C.

COMMANDS = {
    "reset": "start anew; the system text stays",
    "system": "TEXT: start anew with this system text; without TEXT show it; 'none' removes it",
    "score": "score the last answer with the reward model",
    "help": "list the commands",
    "quit": "end, as Ctrl-D does",
}
"""The commands of the conversation, each with what it does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Talks to a model in the terminal.

    Attributes:
        model: folder of ours, Hugging Face folder, or hub id; with `base_url` the name of a model
            there, None for its first.
        base_url: of an OpenAI-compatible server, as http://127.0.0.1:8000/v1; the key is read from
            OPENAI_API_KEY. None for a model on this machine.
        reward_model: for `/score`; a folder or hub id, or the name of a reward model of the server.
            None for the server's first.
        system: system text; None for the template's or the server's own.
        temperature: None for the model's own, as are the other fields of sampling.
        top_k: the k best tokens; 0 for all.
        top_p: the best tokens that together have this probability.
        min_p: tokens with at least this share of the best one's probability.
        repetition_penalty: 1 for none.
        max_new_tokens: tokens of an answer at most.
        seed: decides the answers; None draws a new one for each.
        drop_oldest_turns: leave out the oldest turns of a conversation that is too long, also for
            its score; for a model on this machine.
        template: chat template by name, of a model on this machine; None for its own.
        max_length: tokens of a conversation, of a model on this machine; None for its positions.
        compute_dtype: of a model on this machine; None for float32 on CPU, bfloat16 elsewhere.
        history: file to keep what is typed, for the arrow keys; None keeps it in memory only.
    """

    model: str | None = None
    base_url: Text | None = None
    reward_model: str | None = None
    system: str | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    drop_oldest_turns: bool = False
    template: str | None = None
    max_length: int | None = None
    compute_dtype: str | None = None
    history: str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for fields that do not go together."""
        if self.model is None and self.base_url is None:
            raise ValueError("--model is missing; give a folder, or --base_url for a server")
        if self.system is not None and is_empty(self.system):
            raise ValueError("system is empty; None takes the template's default")
        if self.seed is not None and not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed={self.seed} must lie between 0 and 2^32 - 1")
        if self.base_url is not None:
            local = ("template", "max_length", "compute_dtype")
            given = [name for name in local if getattr(self, name) is not None]
            given += ["drop_oldest_turns"] if self.drop_oldest_turns else []
            if given:
                raise ValueError(f"{', '.join(given)}: not with base_url; the server decides it")

    @property
    def sampling(self) -> SamplingFields:
        """Returns the fields of sampling that are given."""
        fields = {name: getattr(self, name, None) for name in SamplingFields.__annotations__}
        given = {name: value for name, value in fields.items() if value is not None}
        return cast(SamplingFields, given)


class Unanswered(Exception):
    """An answer or a score that does not come; the message is one line."""


class Partner(Protocol):
    """A model to talk to."""

    name: str

    def stream(self, messages: Messages) -> Generator[Delta, None, None]:
        """Yields the answer to a dialogue in pieces.

        Raises:
            Unanswered: there is none, or no more of it.
        """

    def score(self, messages: Messages, answer: str) -> float:
        """Returns the raw reward score of an answer to a dialogue.

        Raises:
            Unanswered: there is none.
        """


Score = Callable[[Messages, str], float]
"""Returns the raw score of an answer to a dialogue; raises Unanswered."""


def _no_reward_model(messages: Messages, answer: str) -> float:
    raise Unanswered("no reward model; name one by --reward_model")


def _score_of(source: str | None, settings: Settings, *, drop_oldest_turns: bool = False) -> Score:
    """Opens a reward model on disk, whose weights are read for the first score."""
    if source is None:
        return _no_reward_model
    model = open_reward_model(source, settings)

    def score(messages: Messages, answer: str) -> float:
        try:
            return model.score(messages, answer, raw=True, drop_oldest_turns=drop_oldest_turns)
        except (ValueError, OSError) as error:
            raise Unanswered(str(error)) from error

    return score


class LocalPartner:
    """A model on this machine, which answers through the engine."""

    def __init__(self, model: Model, *, name: str, flags: Flags, score: Score) -> None:
        """Takes a loaded model.

        Args:
            model: that answers.
            name: shown at the start.
            flags: sampling, seed, and the rule for a conversation that is too long.
            score: of the reward model.
        """
        self.name, self.score = name, score
        self._model, self._flags = model, flags

    def stream(self, messages: Messages) -> Generator[Delta, None, None]:
        """Yields the answer in pieces; see `Partner`."""
        flags = self._flags
        try:
            yield from self._model.stream(
                messages,
                seed=_seed(flags),
                drop_oldest_turns=flags.drop_oldest_turns,
                **flags.sampling,
            )
        except (ValueError, OSError) as error:
            raise Unanswered(str(error)) from error


class ServedModels(NamedTuple):
    """The names of a server's models; both are empty where it does not list them."""

    policies: tuple[str, ...]
    rewards: tuple[str, ...]


class ServedPartner:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, client: openai.OpenAI, *, flags: Flags, name: str, score: Score) -> None:
        """Takes a client whose server has answered.

        Args:
            client: of the server.
            flags: sampling and seed.
            name: of the model there.
            score: of the reward model.
        """
        self.name, self.score = name, score
        self._client, self._flags = client, flags

    def stream(self, messages: Messages) -> Generator[Delta, None, None]:
        """Yields the answer in pieces; see `Partner`."""
        finish_reason = None
        with _as_unanswered(self._client):
            with self._client.chat.completions.create(
                model=self.name,
                messages=cast(Any, _as_dicts(messages)),
                stream=True,
                extra_body=_served_fields(self._flags),
            ) as chunks:
                for chunk in chunks:
                    for choice in chunk.choices or ():
                        if choice.delta and choice.delta.content:
                            yield Delta(choice.delta.content)
                        finish_reason = choice.finish_reason or finish_reason
        if finish_reason is None:
            raise Unanswered("the connection ended before the answer did")
        yield Delta("", "length" if finish_reason == "length" else "stop")


def _served_fields(flags: Flags) -> dict[str, Any]:
    """Returns the fields of sampling that are given, under OpenAI's names."""
    fields: dict[str, Any] = dict(flags.sampling)
    if "max_new_tokens" in fields:
        fields["max_tokens"] = fields.pop("max_new_tokens")
    return fields if flags.seed is None else {**fields, "seed": flags.seed}


def _served_score(client: openai.OpenAI, name: str) -> Score:
    def score(messages: Messages, answer: str) -> float:
        body = {"model": name, "messages": _as_dicts(messages), "responses": [answer]}
        with _as_unanswered(client):
            found = client.post("/classify", cast_to=object, body=body)
        match found:
            case {"data": [{"score": int() | float() as value}]}:
                return float(value)
        raise Unanswered(f"the server gives no score: {printable(str(found))[:200]}")

    return score


@contextlib.contextmanager
def _as_unanswered(client: openai.OpenAI) -> Iterator[None]:
    """Turns the client's errors, and those over what a server sends, into one line."""
    try:
        yield
    except openai.APIStatusError as error:
        words = f"the server refuses with status {error.status_code}: {error.message}"
        raise Unanswered(printable(scrubbed(words, client.api_key))) from error
    except openai.APIConnectionError as error:
        words = f"no connection to {client.base_url}: {error.__cause__ or error}"
        raise Unanswered(printable(words)) from error
    except openai.OpenAIError as error:
        raise Unanswered(printable(scrubbed(str(error), client.api_key))) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        words = f"the server's reply cannot be read: {error}"
        raise Unanswered(printable(scrubbed(words, client.api_key))) from error


def served_models(client: openai.OpenAI) -> ServedModels:
    """Returns the models of a server by their kind.

    Raises:
        ValueError: it does not answer, or refuses.
    """
    try:
        with _as_unanswered(client):
            found = client.get("/models", cast_to=object)
    except Unanswered as error:
        cause = error.__cause__
        if isinstance(cause, openai.APIStatusError) and cause.status_code in _NO_LIST:
            return ServedModels((), ())
        raise ValueError(f"{error} (base_url, and the key in {KEY_VARIABLE})") from error
    listed = found["data"] if isinstance(found, dict) and "data" in found else ()
    policies, rewards = [], []
    for one in listed if isinstance(listed, list) else ():
        match one:
            case {"id": str(name), "huatuo": {"kind": "reward"}}:
                rewards.append(name)
            case {"id": str(name)}:
                policies.append(name)
    return ServedModels(tuple(policies), tuple(rewards))


def find_partner(flags: Flags) -> Partner:
    """Loads the model, or finds it on the server.

    Raises:
        ValueError: there is no such model, or the server does not answer.
        OSError: weights cannot be read.
    """
    settings = Settings(compute_dtype=flags.compute_dtype)
    if flags.base_url is None:
        assert flags.model is not None
        # Opened before the long wait for the policy.
        score = _score_of(flags.reward_model, settings, drop_oldest_turns=flags.drop_oldest_turns)
        model = load_model(
            flags.model,
            slots=1,
            template=flags.template,
            max_length=flags.max_length,
            compute_dtype=flags.compute_dtype,
        )
        name = os.path.basename(os.path.normpath(flags.model))
        return LocalPartner(model, name=name, flags=flags, score=score)
    key = os.environ[KEY_VARIABLE] if os.environ.get(KEY_VARIABLE) else "none"
    client = openai.OpenAI(base_url=flags.base_url, api_key=key, max_retries=1)
    served = served_models(client)
    if flags.model is None and not served.policies:
        raise ValueError(f"--model is missing; {flags.base_url} lists no models")
    if flags.model is not None and served.policies and flags.model not in served.policies:
        raise ValueError(
            f"model={flags.model!r} is not at {flags.base_url}; it has {', '.join(served.policies)}"
        )
    return ServedPartner(
        client,
        flags=flags,
        name=flags.model or served.policies[0],
        score=_score_beside(client, served.rewards, flags.reward_model, settings),
    )


def _score_beside(
    client: openai.OpenAI, rewards: Sequence[str], wanted: str | None, settings: Settings
) -> Score:
    """Returns the scores of a reward model of the server, or of one on this machine."""
    if wanted is None:
        return _served_score(client, rewards[0]) if rewards else _no_reward_model
    if wanted in rewards:
        return _served_score(client, wanted)
    return _score_of(wanted, settings)


class Conversation:
    """A conversation with a model, by lines that are typed."""

    def __init__(
        self, partner: Partner, *, console: rich.console.Console, system: str | None = None
    ) -> None:
        """Starts without turns.

        Args:
            partner: the model.
            console: answers and messages are written there.
            system: system text; None for the model's own.
        """
        self._partner, self._console, self._system = partner, console, system
        self.messages: Messages = self._opening()
        """The turns so far."""

    def take(self, line: str) -> bool:
        """Answers a line, or runs its command; returns False at the end of the conversation.

        A failure is one line, and the turns before it stay.
        """
        text = line.strip()
        if not text:
            return True
        if text == "/quit":
            return False
        try:
            if text.startswith("/"):
                self._run(text)
            else:
                self._ask(text)
        except Unanswered as error:
            self._tell(f"error: {printable(str(error))}", style="red")
        except KeyboardInterrupt:
            self._tell("stopped", style="yellow")
        return True

    def _run(self, text: str) -> None:
        """Runs a command."""
        name, _, rest = text[1:].partition(" ")
        rest = rest.strip()
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            right = f"did you mean /{near[0]}?" if near else "/help lists the commands"
            raise Unanswered(f"unknown command /{name}; {right}")
        if rest and name != "system":
            raise Unanswered(f"/{name} takes nothing after it")
        match name:
            case "help":
                self._help()
            case "score":
                self._score()
            case "reset":
                self.messages = self._opening()
                self._tell("a new conversation")
            case "system" if not rest:
                self._tell(f"system: {self._system or 'the model has its own'}")
            case "system":
                self._system = None if rest == "none" else _checked(rest)
                self.messages = self._opening()
                self._tell("a new conversation with this system text")

    def _ask(self, text: str) -> None:
        """Answers the user; what was written when it stops is kept as the answer."""
        asked = (*self.messages, Message("user", _checked(text)))
        answer, finish_reason = "", None
        try:
            with contextlib.closing(self._waiting(asked)) as deltas:
                for delta in deltas:
                    answer += delta.text
                    finish_reason = delta.finish_reason
                    self._write(delta.text)
        finally:
            if answer:
                self._write("\n")
            # Without an answer, the question would be followed by another question.
            if not is_empty(answer):
                self.messages = (*asked, Message("assistant", answer))
        if is_empty(answer):
            self._tell("(empty answer: the question is left out of the conversation)")
        elif finish_reason == "length":
            self._tell("the length limit was reached: the answer is incomplete", style="yellow")

    def _waiting(self, asked: Messages) -> Generator[Delta, None, None]:
        """Yields the answer's pieces; until the first a terminal shows that it is awaited."""
        with contextlib.closing(self._partner.stream(asked)) as deltas:
            with self._console.status("", spinner="dots"):
                first = next(deltas, None)
            if first is not None:
                yield first
                yield from deltas

    def _score(self) -> None:
        if self.messages == self._opening():
            raise Unanswered("there is no answer yet to score")
        answer = self.messages[-1].content
        with self._console.status("", spinner="dots"):
            found = self._partner.score(self.messages[:-1], answer)
        self._tell(f"reward score {found:.4f}")

    def _help(self) -> None:
        table = rich.table.Table.grid(padding=(0, 2))
        for name, does in COMMANDS.items():
            table.add_row(f"/{name}", rich.markup.escape(does))
        table.add_row("Ctrl-C", "stop the answer; what is written is kept")
        self._console.print(table)

    def _opening(self) -> Messages:
        return () if self._system is None else (Message("system", self._system),)

    def _write(self, text: str) -> None:
        """Writes text of a model, whose control characters must not reach the terminal."""
        self._console.print(plain(text), end="", markup=False, highlight=False, soft_wrap=True)

    def _tell(self, line: str, *, style: str = "dim") -> None:
        self._console.print(plain(line), style=style, markup=False, highlight=False, soft_wrap=True)


def main(flags: Flags) -> None:
    """Talks until the end of the input, or `/quit`.

    Raises:
        ValueError: there is no such model, or a flag is invalid.
        OSError: weights or the history cannot be read.
    """
    console = rich.console.Console()
    try:
        with line_editing(flags.history):
            with console.status("loading the model"):
                partner = find_partner(flags)
            if sys.stdin.isatty():
                words = f"{plain(partner.name)}: /help lists the commands"
                console.print(words, style="dim", markup=False, highlight=False)
            conversation = Conversation(partner, console=console, system=flags.system)
            converse(conversation, console=console)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def converse(conversation: Conversation, *, console: rich.console.Console) -> None:
    """Reads lines from standard input until its end or `/quit`."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            line = input(_PROMPT if is_terminal else "")
        except EOFError:
            if is_terminal:
                console.print()
            return
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D ends", style="dim")
            continue
        except UnicodeDecodeError:
            console.print("error: the input is not UTF-8", style="red")
            continue
        if not conversation.take(line):
            return


@contextlib.contextmanager
def line_editing(history: str | None) -> Iterator[None]:
    """Lets a terminal edit its line and go back to earlier ones.

    Args:
        history: file to read them from and to keep them in, for this user only; None for memory.

    Raises:
        OSError: the file cannot be read or written.
    """
    readline = _readline()
    if history is None or readline is None:
        yield
        return
    path = pathlib.Path(history).expanduser()
    # A patient's words are nobody else's to read.
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    readline.read_history_file(path)
    try:
        yield
    finally:
        readline.write_history_file(path)


def _readline() -> ModuleType | None:
    """Returns Python's line editing; None on systems without it."""
    try:
        return importlib.import_module("readline")
    except ImportError:
        return None


def _checked(text: str) -> str:
    """Returns the text; raises Unanswered where its bytes were no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unanswered("the text is not valid UTF-8") from None
    return text


def _seed(flags: Flags) -> int:
    return secrets.randbelow(_SEEDS) if flags.seed is None else flags.seed


def _as_dicts(messages: Messages) -> list[Mapping[str, str]]:
    return [{"role": one.role, "content": one.content} for one in messages]
