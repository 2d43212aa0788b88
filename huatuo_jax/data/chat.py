"""Chat templates: one object renders a dialogue for training, generation, evaluation and export.

What holds for every template:

- `render` gives the training ids, the mask of trained tokens and where each turn lies; `prompt`
  gives what stands before the next answer. The prompt of `messages[:k]` is exactly the start of the
  training ids, up to where the content of answer k begins (`TurnSpan.content_start`).
- The mask follows from how the ids were put together, turn by turn. It is not searched for in the
  text, and not derived from ids, so padding may equal EOS. The token that ends a doctor's turn is
  always trained.
- Ids equal those of transformers' `apply_chat_template` on the same template (HuatuoGPT's and
  Baichuan's are defined piece by piece instead). The two exceptions, an answer whose first
  characters would merge into the header before it, and text that spells a special token, are
  described in `chat_pieces`.

A dialogue is an optional system message, then patient and doctor in turn. `repr(template)` names
the template and all its settings: it is what a cache key needs to hold.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from huatuo_jax.data.chat_pieces import Piece, PieceEncoder
from huatuo_jax.data.records import Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainedTurns = Literal["all", "last"]
TruncationPolicy = Literal["drop_oldest_turns", "drop_row"]


class TurnSpan(NamedTuple):
    """Where a turn lies in the token ids: `[start, end)`.

    `content_start` is where generation would begin in a doctor's turn; elsewhere it equals `start`.
    Ids before the first message (start tokens) form a system turn.
    """

    role: Role
    start: int
    content_start: int
    end: int


class Rendered(NamedTuple):
    """A dialogue as training sees it: ids, which of them are trained, and the turns."""

    token_ids: list[int]
    trained_mask: list[bool]
    turns: list[TurnSpan]


class NothingToTrain(ValueError):
    """A dialogue of which no token would be trained."""


class TurnTokens(NamedTuple):
    """One turn's tokens; the first `num_header` of them are there before generation starts."""

    role: Role
    token_ids: list[int]
    trained_mask: list[bool]
    num_header: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate(abc.ABC):
    """How a dialogue becomes text and token ids.

    `default_system` is the system text of a dialogue that has no system message of its own (None:
    such a dialogue has no system text).
    """

    name: ClassVar[str]
    turn_marks: ClassVar[tuple[str, ...]] = ()
    """Plain texts that begin a turn which is tokenised as a text of its own."""
    default_system: str | None = None

    @abc.abstractmethod
    def tokenize(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
    ) -> list[TurnTokens]:
        """Tokenises a valid dialogue turn by turn.

        Where the patient speaks last, the list ends with a doctor's turn that is only its header.
        """

    @abc.abstractmethod
    def text(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of the ids: the training text where the doctor speaks last, else the prompt."""

    @abc.abstractmethod
    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The ids that end an answer, the template's own end of turn first."""

    @abc.abstractmethod
    def control_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """The strings of the tokens that the template writes by their id, in order, each once."""

    @abc.abstractmethod
    def to_jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """A `chat_template` for an exported tokenizer, which renders the same text as `text`."""

    @abc.abstractmethod
    def unfinished(
        self, messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[int]:
        """The ids of a prompt and of an answer that was cut off: no end of turn follows `text`.

        Raises ValueError for a dialogue that does not end with the user.
        """

    @abc.abstractmethod
    def content_of(self, text: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool) -> str:
        """The message content of an answer's sampled text, its end of turn left out.

        A template may write something of its own around the content, such as HuatuoGPT's space
        before EOS. A model that was trained with the template samples it; it is taken off here, so
        that rendering the content again adds it once and not twice. What stands after the content
        is there only if the answer `ended`.
        """

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        *,
        trained: TrainedTurns = "all",
    ) -> Rendered:
        """Renders a dialogue for training; `trained` says which of the doctor's turns are learned.

        A turn whose message is not `trained` is never learned.

        Raises ValueError for a dialogue that is out of order, does not end with the doctor, or
        cannot be said in this template, NothingToTrain for one that would train no token.
        """
        rendered = self.render_any(messages, tokenizer, trained=trained)
        if not any(rendered.trained_mask):
            raise NothingToTrain(f"messages: template {self.name!r} would train no token of them")
        return rendered

    def render_any(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        *,
        trained: TrainedTurns = "all",
    ) -> Rendered:
        """As `render`, also of a dialogue that would train no token."""
        if trained not in get_args(TrainedTurns):
            raise ValueError(f"trained: {trained!r} is not one of {get_args(TrainedTurns)}")
        check_dialogue(messages, last="assistant")
        turns = self.tokenize(messages, tokenizer)
        token_ids: list[int] = []
        trained_mask: list[bool] = []
        spans: list[TurnSpan] = []
        marks = iter([message.trained for message in messages if message.role == "assistant"])
        for turn in turns:
            start = len(token_ids)
            learned = turn.role != "assistant" or next(marks)
            learned = learned and (trained == "all" or turn is turns[-1])
            token_ids += turn.token_ids
            trained_mask += turn.trained_mask if learned else [False] * len(turn.token_ids)
            content_start = start + (turn.num_header if turn.role == "assistant" else 0)
            spans.append(TurnSpan(turn.role, start, content_start, len(token_ids)))
        return Rendered(token_ids, trained_mask, spans)

    def prompt(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The ids the doctor's next answer is generated from, its header included."""
        check_dialogue(messages, last="user")
        turns = self.tokenize(messages, tokenizer)
        return list(itertools.chain.from_iterable(turn.token_ids for turn in turns))

    def check_fits(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, name: str) -> None:
        """Raises ValueError where the template's own tokens lie past a model's embedding.

        Args:
            tokenizer: the model's.
            vocab_size: number of embedding rows.
            name: of the tokenizer, for the message.
        """
        probe = [Message("user", "?"), Message("assistant", "!")]
        largest = max(self.render(probe, tokenizer).token_ids)
        if largest >= vocab_size:
            raise ValueError(
                f"{name}: the template {self.name!r} needs its token {largest} "
                f"({tokenizer.convert_ids_to_tokens(largest)!r}), and the model's vocab_size is "
                f"{vocab_size}: add rows to its embedding, or choose another template"
            )


class Turn(NamedTuple):
    """One turn in pieces: a header that is there before generation starts, and the rest."""

    role: Role
    header: tuple[Piece, ...]
    body: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceTemplate(ChatTemplate):
    """A template that says its pieces itself; subclasses say what each kind of turn is made of."""

    _before_content: ClassVar[str] = ""
    """What `_answer` writes before the content."""

    @abc.abstractmethod
    def _opening(self, system: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        """What stands before the first turn: start tokens and the system text, if any."""

    @abc.abstractmethod
    def _question(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        """A patient's turn."""

    @abc.abstractmethod
    def _answer_header(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        """What stands before a doctor's answer, and ends a prompt."""

    @abc.abstractmethod
    def _answer(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        """A doctor's answer after its header; its trained pieces end with the end of the turn."""

    def _turns(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
        """The turns of a valid dialogue, with an open answer where the patient speaks last."""
        system, spoken = split_system(messages, self.default_system)
        opening = self._opening(system, tokenizer)
        turns = [Turn("system", (), opening)] if opening else []
        for message in spoken:
            if message.role == "user":
                turns.append(Turn("user", (), self._question(message.content, tokenizer)))
            else:
                body = self._answer(message.content, tokenizer)
                turns.append(Turn("assistant", self._answer_header(tokenizer), body))
        if spoken[-1].role == "user":
            turns.append(Turn("assistant", self._answer_header(tokenizer), ()))
        return turns

    def tokenize(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
    ) -> list[TurnTokens]:
        """Tokenises a valid dialogue piece by piece."""
        turns = self._turns(messages, tokenizer)
        pieces = [piece for turn in turns for piece in turn.header + turn.body]
        encoder = PieceEncoder(tokenizer, [piece.text for piece in pieces if piece.control])
        tokens = []
        for turn in turns:
            token_ids: list[int] = []
            trained_mask: list[bool] = []
            num_header = 0
            for index, piece in enumerate(turn.header + turn.body):
                piece_ids = encoder.encode(piece)
                token_ids += piece_ids
                trained_mask += [piece.trained] * len(piece_ids)
                num_header += len(piece_ids) if index < len(turn.header) else 0
            tokens.append(TurnTokens(turn.role, token_ids, trained_mask, num_header))
        return tokens

    def unfinished(
        self, messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[int]:
        """The ids of a prompt and of an answer that was cut off; see `ChatTemplate.unfinished`."""
        check_dialogue(messages, last="user")
        pieces = [
            piece for turn in self._turns(messages, tokenizer) for piece in turn.header + turn.body
        ]
        finished = self._answer(text, tokenizer)
        encoder = PieceEncoder(
            tokenizer, [piece.text for piece in (*pieces, *finished) if piece.control]
        )
        # As the first piece of an answer, so that its start is tokenised as in training.
        cut_off = finished[0]._replace(text=self._before_content + text)
        return [one for piece in (*pieces, cut_off) for one in encoder.encode(piece)]

    def content_of(self, text: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool) -> str:
        """The content of an answer's text; see `ChatTemplate.content_of`."""
        return text

    def control_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Those of a small dialogue; see `ChatTemplate.control_tokens`."""
        probe = [Message("system", "a"), Message("user", "b"), Message("assistant", "c")]
        turns = self._turns(probe, tokenizer)
        pieces = (piece for turn in turns for piece in turn.header + turn.body)
        return tuple(dict.fromkeys(piece.text for piece in pieces if piece.control))

    def text(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
        """The text of the ids: the training text where the doctor speaks last, else the prompt."""
        check_dialogue(messages, last=None)
        turns = self._turns(messages, tokenizer)
        return "".join(piece.text for turn in turns for piece in turn.header + turn.body)


def split_system(
    messages: Sequence[Message], default_system: str | None
) -> tuple[str | None, Sequence[Message]]:
    """The system text of a valid dialogue, its own or the default, and the spoken turns."""
    if messages[0].role == "system":
        return messages[0].content, messages[1:]
    return default_system, messages


def check_dialogue(
    messages: Sequence[Message], *, last: Literal["user", "assistant"] | None
) -> None:
    """Raises ValueError unless the turns alternate from the patient on and end with `last`."""
    has_system = bool(messages) and messages[0].role == "system"
    spoken = messages[1:] if has_system else messages
    if not spoken:
        raise ValueError("messages: no turn; a dialogue needs at least a patient's turn")
    for index, message in enumerate(spoken):
        expected = "user" if index % 2 == 0 else "assistant"
        if message.role != expected:
            raise ValueError(
                f"messages[{index + has_system}].role: {message.role!r}, but {expected!r} is due; "
                "a dialogue is an optional system message, then user and assistant in turn"
            )
    if last is not None and spoken[-1].role != last:
        raise ValueError(
            f"messages[-1].role: {spoken[-1].role!r}; it has to be {last!r} here (an answer is "
            "trained after its question, and generated after a question)"
        )


class Truncated(NamedTuple):
    """What is left of a dialogue: None if the row was dropped, and how many messages went."""

    rendered: Rendered | None
    num_messages_dropped: int


def truncate(
    template: ChatTemplate,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    policy: TruncationPolicy,
    trained: TrainedTurns = "all",
) -> Truncated:
    """Renders a dialogue in at most `max_tokens` tokens, and never cuts into a turn.

    `drop_oldest_turns` keeps the system text and drops the oldest question with its answer until
    the rest fits; a dialogue whose last exchange alone is too long is dropped, and so is one of
    which nothing would be trained then. `drop_row` drops every dialogue that is too long. Raises
    ValueError as `render` does.
    """
    if policy not in get_args(TruncationPolicy):
        raise ValueError(f"policy: {policy!r} is not one of {get_args(TruncationPolicy)}")
    rendered = template.render(messages, tokenizer, trained=trained)
    if len(rendered.token_ids) <= max_tokens:
        return Truncated(rendered, 0)
    dropped_row = Truncated(None, len(messages))
    if policy == "drop_row":
        return dropped_row
    num_system = int(messages[0].role == "system")
    system, spoken = messages[:num_system], messages[num_system:]
    last_exchange = template.render_any([*system, *spoken[-2:]], tokenizer, trained=trained)
    if len(last_exchange.token_ids) > max_tokens:
        return dropped_row
    shortened, start = last_exchange, len(spoken) - 2
    for start in range(2, len(spoken), 2):
        shortened = template.render_any([*system, *spoken[start:]], tokenizer, trained=trained)
        if len(shortened.token_ids) <= max_tokens:
            break
    # What was to be learned may have been in the turns that went.
    return Truncated(shortened, start) if any(shortened.trained_mask) else dropped_row
