"""The text of an answer while it is being written, in pieces that never have to be taken back."""

import re
from collections.abc import Sequence

import transformers

from huatuo_jax.data.answers import text_of
from huatuo_jax.data.chat.template import ChatTemplate, without_start_of

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # A token of one byte in a SentencePiece vocabulary.
_INCOMPLETE = "\ufffd"  # Of bytes that are no character yet.


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
        self.text = ""
        """The text given out so far."""

    def grow(self, token_ids: Sequence[int]) -> str:
        """Returns the new piece of text of an unfinished answer.

        Args:
            token_ids: all of the answer so far.
        """
        end = len(token_ids)
        # A run of byte tokens decodes as a whole: one byte too many makes all of them U+FFFD.
        while end and self._is_byte(token_ids[end - 1]):
            end -= 1
        text = text_of(self._tokenizer, token_ids[:end]).rstrip(_INCOMPLETE)
        text = without_start_of(text, self._stop_strings)
        if self._template is None:
            return self._more(text)
        return self._more(self._template.settled_content(text, self._tokenizer))

    def finish(self, text: str) -> str:
        """Returns the last piece of text.

        Args:
            text: of the complete answer, without what the template writes around it.
        """
        return self._more(text)

    def _more(self, text: str) -> str:
        if not text.startswith(self.text):
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.convert_ids_to_tokens(int(token_id))
        return isinstance(token, str) and _BYTE.fullmatch(token) is not None
