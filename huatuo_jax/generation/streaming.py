"""The text of an answer while it is being written, in pieces that never have to be taken back."""

import re
from collections.abc import Sequence

import transformers

from huatuo_jax.data.answers import text_of
from huatuo_jax.data.chat.template import ChatTemplate, without_start_of

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # A token of one byte in a SentencePiece vocabulary.
_FIRST_BYTE = "<0x00>"
_INCOMPLETE = "\ufffd"  # Of bytes that are no character yet.
_CONTEXT = 16  # Tokens that are decoded again before new ones.


class TextChangedError(ValueError):
    """The text of an answer's first tokens is not the start of the whole answer's text."""

    def __init__(self) -> None:
        """Says so, without the text."""
        super().__init__(
            "the model's tokenizer changes the text of earlier tokens when more follow, so that "
            "its answers cannot be streamed; ask for them without stream"
        )


class GrowingText:
    """Decodes a growing list of token ids, each id a few times however long the list becomes.

    The text of a token depends on those before it in two ways only: white space at the start of a
    text may be left out, and a character's bytes may be spread over several tokens. New tokens are
    therefore decoded behind a few earlier ones that end with a whole character, whose own text is
    then cut off.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
        """Starts without tokens.

        Args:
            tokenizer: the model's.
        """
        self._tokenizer = tokenizer
        # The text of the first `_end` tokens, and that of those of them from `_start` on.
        self._text, self._context = "", ""
        self._start = self._end = 0
        self._num_scanned = self._run_start = 0
        self._special = _special_beside_bytes(tokenizer)

    def of(self, token_ids: Sequence[int]) -> str:
        """Returns the text of all ids, exactly as `text_of` does.

        Args:
            token_ids: at least those that `settled` last got.
        """
        text = text_of(self._tokenizer, token_ids[self._start :])
        if not text.startswith(self._context):
            return text_of(self._tokenizer, token_ids)
        return self._text + text[len(self._context) :]

    def settled(self, token_ids: Sequence[int]) -> str:
        """Returns the start of the text that holds however the ids continue.

        Args:
            token_ids: at least those that it got before.
        """
        end = self._end_of_whole_bytes(token_ids)
        text = self.of(token_ids[:end])
        if end - self._end >= _CONTEXT and not text.endswith(_INCOMPLETE):
            context = text_of(self._tokenizer, token_ids[self._end : end])
            if context.strip():  # Else white space after it might be taken for that at the start.
                self._text, self._context = text, context
                self._start, self._end = self._end, end
        return text.rstrip(_INCOMPLETE)

    def _end_of_whole_bytes(self, token_ids: Sequence[int]) -> int:
        """Returns the number of ids before a run of byte tokens at the end.

        A run decodes as a whole: one byte too many makes all of them U+FFFD. Special tokens, which
        have no text, do not end it.
        """
        end = len(token_ids)
        if self._special is None:
            return end
        while end > self._num_scanned and self._continues_run(int(token_ids[end - 1])):
            end -= 1
        if end > self._num_scanned:
            self._run_start = end
        self._num_scanned = len(token_ids)
        return self._run_start

    def _continues_run(self, token_id: int) -> bool:
        assert self._special is not None
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        is_byte = isinstance(token, str) and _BYTE.fullmatch(token) is not None
        return is_byte or token_id in self._special


def _special_beside_bytes(
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> frozenset[int] | None:
    """Returns the ids of special tokens where the tokenizer has tokens of bytes, else None."""
    byte_id = tokenizer.convert_tokens_to_ids(_FIRST_BYTE)
    if byte_id is None or tokenizer.convert_ids_to_tokens(byte_id) != _FIRST_BYTE:
        return None
    added = (one for one, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*added, *tokenizer.all_special_ids])


class GrowingAnswer:
    """Turns the token ids of a growing answer into pieces of its text.

    Held back until more tokens tell are a character whose bytes are not all there, text that may
    start a stop string or what the template writes after an answer, and white space at the end.
    The pieces together are the answer's text.
    """

    def __init__(
        self,
        template: ChatTemplate | None,
        tokenizer: transformers.PreTrainedTokenizerBase,
        stop_strings: Sequence[str] = (),
    ) -> None:
        """Starts without tokens.

        Args:
            template: that rendered the prompt; None for the text as it is, white space and all.
            tokenizer: the model's.
            stop_strings: of the answer's sampling.
        """
        self._template, self._tokenizer = template, tokenizer
        self._stop_strings = tuple(stop_strings)
        self._growing = GrowingText(tokenizer)
        self.text = ""
        """The text given out so far."""

    def grow(self, token_ids: Sequence[int]) -> str:
        """Returns the new piece of text of an unfinished answer.

        Args:
            token_ids: all of the answer so far.

        Raises:
            TextChangedError: the text does not continue the text given out before.
        """
        text = without_start_of(self._growing.settled(token_ids), self._stop_strings)
        if self._template is None:
            return self._more(text)
        return self._more(self._template.settled_content(text, self._tokenizer))

    def finish(self, text: str) -> str:
        """Returns the last piece of text.

        Args:
            text: of the complete answer, without what the template writes around it.

        Raises:
            TextChangedError: the text does not continue the text given out before.
        """
        return self._more(text)

    def _more(self, text: str) -> str:
        if not text.startswith(self.text):
            raise TextChangedError
        piece, self.text = text[len(self.text) :], text
        return piece
