"""Chat templates: one object renders a dialogue for training, generation, evaluation and export.

A dialogue is an optional system message, then user and assistant in turn. For every template:

- `render` gives the training ids, the mask of trained tokens and the range of each turn; `prompt`
  gives the ids before the next response. The prompt of `messages[:k]` is exactly the start of the
  training ids, up to the content of response k (`TurnSpan.content_start`).
- The mask follows from how the ids are put together, turn by turn. It is not searched for in the
  text and not derived from ids, so padding may equal EOS. The token that ends an assistant turn is
  always trained.
- Ids equal those of transformers' `apply_chat_template` on the same template, with two exceptions
  below (HuatuoGPT's and Baichuan's templates are defined piece by piece instead).
- `repr(template)` names the template and all its settings, for cache keys.

A template is a sequence of pieces: control tokens and texts. A control token (`<|im_start|>`, EOS)
is looked up by its string and never parsed out of a text. A text is tokenised as it would be in the
whole rendering, where special tokens cut the text first: right after the control token it follows
(this matters to SentencePiece, which treats the start of a text differently), or as the start of a
text of its own if the template marks it so (`apart`).

First exception: generation starts between two texts in a row, such as `assistant` + newline and the
content, so their border must be a border of tokens. They are tokenised together; if the tokens of
the first one come out unchanged, that is the result, as in the whole rendering. If not (a response
that begins with a newline, after a header that ends with one), the second text is tokenised by
itself, because a model that generates has the header's tokens in its context already.

Second exception: text that spells a special token (`</s>` in a user's question) stays text. It is
cut after its first character and the parts are tokenised one by one. `apply_chat_template` would
make it a control token unless called with `sanitize_control_tokens=True`. Added tokens that are not
special, such as `<think>` in some tokenizers, are left to the tokenizer, as in transformers.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

from huatuo_jax.data.records import Message, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainedTurns = Literal["all", "last"]
TruncationPolicy = Literal["drop_oldest_turns", "drop_row"]


class Piece(NamedTuple):
    """A part of a rendering that is tokenised on its own.

    `control`: the text is the string of one token. `trained`: its tokens are learned.
    `apart`: a text that is tokenised as if nothing stood before it.
    """

    text: str
    control: bool = False
    trained: bool = False
    apart: bool = False


def control(text: str, *, trained: bool = False) -> Piece:
    """Returns a piece that is one token of the tokenizer."""
    return Piece(text, control=True, trained=trained)


def control_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Returns the id of a control token; ValueError if the tokenizer does not have it."""
    token_id = tokenizer.convert_tokens_to_ids(text)
    if token_id is None or (token_id == tokenizer.unk_token_id and text != tokenizer.unk_token):
        raise ValueError(
            f"tokenizer: has no token {text!r}, which the template needs; choose a template that "
            "fits the tokenizer, or add the token to it (and to the embeddings) as a special token"
        )
    return int(token_id)


def special_strings(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Returns the strings of the special tokens, which a text of a dialogue may only spell.

    One-character ones are left out: they are ordinary text used for padding, not structure.
    """
    added = tokenizer.added_tokens_decoder.values()
    strings = {token.content for token in added if token.special}
    return frozenset(text for text in strings.union(tokenizer.all_special_tokens) if len(text) > 1)


@functools.lru_cache(maxsize=16)
def _any_of(strings: frozenset[str]) -> re.Pattern[str]:
    # "(?!)" matches nothing: a tokenizer without special tokens has nothing to protect.
    return re.compile("|".join(map(re.escape, sorted(strings))) or "(?!)")


def cut_apart(text: str, strings: frozenset[str]) -> list[str]:
    """Cuts a text into chunks that join to it and none of which holds one of the strings.

    The strings have two characters or more; each occurrence is cut after its first character.
    """
    chunks: list[str] = []
    start = 0
    pattern = _any_of(strings)
    while match := pattern.search(text, start):
        chunks.append(text[start : match.start() + 1])
        start = match.start() + 1
    return [*chunks, text[start:]]


def without_start_of(text: str, ends: Sequence[str]) -> str:
    """Returns a text without the longest end of it that may be the start of one of these texts."""
    longest = max((len(one) for one in ends), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(one.startswith(text[-length:]) for one in ends):
            return text[:-length]
    return text


def encode_after(tokenizer: PreTrainedTokenizerBase, anchor: str | None, text: str) -> list[int]:
    """Returns the ids of a text right after a control token, or at the start of a text if None."""
    # Not verbose: `truncate` limits the length, the tokenizer need not warn.
    if anchor is None:
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    token_ids = tokenizer.encode(anchor + text, add_special_tokens=False, verbose=False)
    if token_ids[:1] != [control_id(tokenizer, anchor)]:
        raise ValueError(
            f"tokenizer: reads {anchor!r} as text, though it is in its vocabulary; "
            "add it as a special token (`add_special_tokens`)"
        )
    return list(token_ids[1:])


class PieceEncoder:
    """Tokenises the pieces of one rendering in order.

    `controls` are the control tokens of the template. No text may become one of them or a special
    token of the tokenizer. Raises ValueError if the tokenizer lacks one of them, or makes one out
    of plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, controls: Iterable[str]) -> None:
        """Looks the control tokens up; ValueError for one the tokenizer does not have."""
        self._tokenizer = tokenizer
        self._ids = {text: control_id(tokenizer, text) for text in controls}
        specials = special_strings(tokenizer)
        self._protected = specials | {text for text in self._ids if len(text) > 1}
        # Characters outside the vocabulary become the unknown token, which controls nothing.
        protected_ids = {control_id(tokenizer, text) for text in self._protected}
        self._protected_ids = protected_ids - {tokenizer.unk_token_id}
        # Precedes the later parts of a text that was cut; any special token will do.
        self._inner_anchor = min(specials, default=None)
        self._anchor: str | None = None
        self._joined = ""
        self._joined_ids: list[int] = []

    def encode(self, piece: Piece) -> list[int]:
        """Returns the ids of the next piece, given the pieces before it."""
        if piece.control or piece.apart:
            self._anchor = piece.text if piece.control else None
            self._joined, self._joined_ids = "", []
        if piece.control:
            return [self._ids[piece.text]]
        together = self._encode_text(self._joined + piece.text)
        border = len(self._joined_ids)
        if together[:border] == self._joined_ids:
            token_ids = together[border:]
        else:
            token_ids = self._encode_text(piece.text)
        self._joined += piece.text
        self._joined_ids = self._joined_ids + token_ids
        return token_ids

    def _encode_text(self, text: str) -> list[int]:
        anchor = self._anchor
        token_ids: list[int] = []
        for chunk in cut_apart(text, self._protected):
            token_ids += encode_after(self._tokenizer, anchor, chunk)
            anchor = self._inner_anchor
        made = self._protected_ids.intersection(token_ids)
        if made:
            raise ValueError(
                f"tokenizer: makes {self._tokenizer.convert_ids_to_tokens(min(made))!r} out of "
                f"plain text ({text[:40]!r}); its special tokens must not be ordinary pieces"
            )
        return token_ids


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the special tokens that the tokenizer itself puts before a text, if any."""
    text = tokenizer.encode("a", add_special_tokens=False)
    wrapped = tokenizer.encode("a", add_special_tokens=True)
    for start in range(len(wrapped) - len(text) + 1):
        if wrapped[start : start + len(text)] == text:
            return list(tokenizer.convert_ids_to_tokens(wrapped[:start]))
    raise ValueError(
        "tokenizer: with special tokens the ids of 'a' change, so its start tokens are not known"
    )


def named_token(tokenizer: PreTrainedTokenizerBase, name: Literal["bos_token", "eos_token"]) -> str:
    """Returns the string of the tokenizer's BOS or EOS; ValueError if it has none."""
    text = tokenizer.special_tokens_map.get(name)
    if text is None:
        raise ValueError(f"tokenizer: has no {name}, which the template needs; set it")
    return str(text)


def token_of_id(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """Returns the string of a token id; ValueError if the vocabulary ends before it."""
    if token_id >= len(tokenizer):
        raise ValueError(
            f"tokenizer: has {len(tokenizer)} tokens, and the template needs token {token_id}"
        )
    return str(tokenizer.convert_ids_to_tokens(token_id))


class TurnSpan(NamedTuple):
    """The token range of a turn: `[start, end)`.

    `content_start` is where generation begins in an assistant turn; elsewhere it equals `start`.
    Ids before the first message (start tokens) form a system turn.
    """

    role: Role
    start: int
    content_start: int
    end: int


class Rendered(NamedTuple):
    """A dialogue for training: ids, the mask of trained ones, and the turns."""

    token_ids: list[int]
    trained_mask: list[bool]
    turns: list[TurnSpan]


class NothingToTrain(ValueError):
    """Raised for a dialogue in which no token would be trained."""


class TurnTokens(NamedTuple):
    """One turn's tokens; the first `num_header` of them precede generation."""

    role: Role
    token_ids: list[int]
    trained_mask: list[bool]
    num_header: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate(abc.ABC):
    """Renders a dialogue as text and token ids.

    `default_system` is the system text of a dialogue that has no system message of its own (None:
    such a dialogue has no system text).
    """

    name: ClassVar[str]
    turn_marks: ClassVar[tuple[str, ...]] = ()
    """Plain texts that begin a turn, where turns are tokenised as texts of their own."""
    default_system: str | None = None

    @abc.abstractmethod
    def tokenize(
        self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
    ) -> list[TurnTokens]:
        """Tokenises a valid dialogue turn by turn.

        If the user speaks last, the list ends with an assistant turn that is only its header.
        """

    @abc.abstractmethod
    def text(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the training text of a dialogue that ends with the assistant, else the prompt."""

    @abc.abstractmethod
    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Returns the ids that end an answer, the template's own end of turn first."""

    @abc.abstractmethod
    def control_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Returns the strings of the tokens written by their id, in order, each once."""

    @abc.abstractmethod
    def to_jinja(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns a Jinja `chat_template` for an exported tokenizer, with the text of `text`."""

    @abc.abstractmethod
    def unfinished(
        self, messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase
    ) -> list[int]:
        """Returns the ids of a prompt and of a response cut off after `text`: no end of turn.

        Raises ValueError for a dialogue that does not end with the user.
        """

    @abc.abstractmethod
    def content_of(self, text: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool) -> str:
        """Returns the message content of a response's sampled text, without its end of turn.

        A template may add text around the content, such as HuatuoGPT's space before EOS. A model
        that was trained with the template samples it; it is removed here, so that rendering the
        content again adds it once and not twice. Text after the content exists only if the
        response `ended`.
        """

    def settled_content(self, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the start of the content that holds however an unfinished response continues.

        White space at the end is left out, as it may belong to the end of the turn.
        """
        return self.content_of(text, tokenizer, ended=False).rstrip()

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        *,
        trained: TrainedTurns = "all",
    ) -> Rendered:
        """Renders a dialogue for training; `trained` selects the assistant turns that are learned.

        A turn whose message is not `trained` is never learned.

        Raises ValueError for a dialogue that is out of order, does not end with the assistant, or
        does not fit this template, NothingToTrain for one that would train no token.
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
        """Renders as `render` does, also a dialogue that would train no token."""
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
        """Returns the ids that the next answer is generated from, its header included."""
        check_dialogue(messages, last="user")
        turns = self.tokenize(messages, tokenizer)
        return list(itertools.chain.from_iterable(turn.token_ids for turn in turns))

    def check_fits(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, name: str) -> None:
        """Checks that the model's embedding has the template's own tokens; else ValueError.

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
    """One turn in pieces: a header that precedes generation, and the rest."""

    role: Role
    header: tuple[Piece, ...]
    body: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceTemplate(ChatTemplate):
    """A template made of pieces; subclasses define the pieces of each kind of turn.

    ChatML, Llama-2 and Llama-3 are written so too, and not as Jinja for `TokenizerTemplate`. The
    ids and masks would be the same, but that one renders and tokenises the whole text again for
    each turn (1.5 to 1.9 times as long for dialogues of six turns), counts headers to the turn
    before, and reads a control token that is not special in the tokenizer as text.
    """

    _before_content: ClassVar[str] = ""
    """The text that `_answer` puts before the content."""
    _strips_content: ClassVar[bool] = False
    """Whether `_answer` removes white space around the content."""
    _end_token: ClassVar[str | None] = None
    """The token that ends an assistant turn; None for EOS."""

    @abc.abstractmethod
    def _opening(self, system: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        """Returns the pieces before the first turn: start tokens and the system text, if any."""

    @abc.abstractmethod
    def _question(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        """Returns the pieces of a user turn."""

    @abc.abstractmethod
    def _answer_header(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        """Returns the pieces before an assistant's content, which end a prompt."""

    @abc.abstractmethod
    def _answer(self, content: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Piece, ...]:
        """Returns an assistant turn after its header; the last trained piece ends the turn."""

    def _turns(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Turn]:
        """Returns the turns of a dialogue, with an open answer if the user speaks last."""
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
        encoder = PieceEncoder(tokenizer, _controls(_pieces(turns)))
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
        """Returns the ids of a prompt and a cut-off response; see `ChatTemplate.unfinished`."""
        check_dialogue(messages, last="user")
        pieces = _pieces(self._turns(messages, tokenizer))
        finished = self._answer(text, tokenizer)
        encoder = PieceEncoder(tokenizer, _controls([*pieces, *finished]))
        # As the first piece of an answer, so that its start is tokenised as in training.
        cut_off = finished[0]._replace(text=self._before_content + text)
        return [one for piece in (*pieces, cut_off) for one in encoder.encode(piece)]

    def content_of(self, text: str, tokenizer: PreTrainedTokenizerBase, *, ended: bool) -> str:
        """Returns the content of an answer's text; see `ChatTemplate.content_of`."""
        if self._strips_content:
            return text.strip() if ended else text.lstrip()
        return text

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Returns the end of a turn, and EOS if that is another token."""
        end_id = control_id(tokenizer, self._end(tokenizer))
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id == end_id:
            return (end_id,)
        return (end_id, int(tokenizer.eos_token_id))

    def _end(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return self._end_token or named_token(tokenizer, "eos_token")

    def control_tokens(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Returns the control tokens of a small dialogue; see `ChatTemplate.control_tokens`."""
        probe = [Message("system", "a"), Message("user", "b"), Message("assistant", "c")]
        return tuple(dict.fromkeys(_controls(_pieces(self._turns(probe, tokenizer)))))

    def text(self, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
        """Returns the training text of a dialogue that ends with the assistant, else the prompt."""
        check_dialogue(messages, last=None)
        return "".join(piece.text for piece in _pieces(self._turns(messages, tokenizer)))


def _pieces(turns: Sequence[Turn]) -> list[Piece]:
    return [piece for turn in turns for piece in turn.header + turn.body]


def _controls(pieces: Sequence[Piece]) -> list[str]:
    return [piece.text for piece in pieces if piece.control]


def split_system(
    messages: Sequence[Message], default_system: str | None
) -> tuple[str | None, Sequence[Message]]:
    """Returns the system text of a valid dialogue, its own or the default, and the spoken turns."""
    if messages[0].role == "system":
        return messages[0].content, messages[1:]
    return default_system, messages


def check_dialogue(
    messages: Sequence[Message], *, last: Literal["user", "assistant"] | None
) -> None:
    """Raises ValueError unless the turns alternate from the user on and end with `last`."""
    has_system = bool(messages) and messages[0].role == "system"
    spoken = messages[1:] if has_system else messages
    if not spoken:
        raise ValueError("messages: no turn; a dialogue needs at least one user turn")
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
    """A truncated dialogue: None if the row was dropped, and the number of messages dropped."""

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
    the rest fits; a dialogue is dropped if its last exchange alone is too long, or if nothing would
    be trained in the rest. `drop_row` drops every dialogue that is too long. Raises ValueError as
    `render` does.
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
    # All trained turns may be among those that were dropped.
    return Truncated(shortened, start) if any(shortened.trained_mask) else dropped_row
