"""The token: where it is from, and keeping it and other credentials out of all that is written."""

import contextlib
import dataclasses
import logging
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import huggingface_hub

MASK = "[token]"
REMOVED = "[removed]"
_SHORTEST = 8  # What is shorter is no token, and would be found in every other word.

# Keys by the form that their issuers give them, and addresses with a password or a key in them. In
# ASCII alone: Chinese writes no blank before or behind a key, and its characters are letters too.
_CREDENTIAL = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,})"
    r"|(?<=://)[^\s/@:\"']*:[^\s/@\"']+(?=@)"
    r"|(?<=[?&])(?:api_?key|key|token|access_token)=[!#-%(-~]{8,}",
    re.IGNORECASE,
)
_USER_OF_ADDRESS = re.compile(r"(?<=://)[^\s/@]+(?=@)")


@dataclasses.dataclass(frozen=True)
class Token:
    """An access token of the Hub.

    Attributes:
        value: the token itself.
        origin: where it is from, for messages.
    """

    value: str = dataclasses.field(repr=False)
    origin: str

    def masked(self, text: str) -> str:
        """The text without the token, and without passwords in addresses."""
        return _USER_OF_ADDRESS.sub(REMOVED, text.replace(self.value, MASK))


def find_token(given: str | None) -> Token:
    """The token of the argument, else of `HF_TOKEN`, else of the stored login.

    Args:
        given: the argument; None where there is none.

    Raises:
        ValueError: there is none, or it cannot be one. The message does not hold it.
    """
    value, origin = given, "--token"
    if value is None:
        value, origin = os.environ.get("HF_TOKEN") or None, "HF_TOKEN"
    if value is None:
        origin = "the stored login"
        try:
            value = huggingface_hub.get_token()
        except Exception as error:  # Renewing a login may fail in any way of the network's.
            raise ValueError(
                f"{origin} cannot be read ({type(error).__name__}); log in again with `hf auth "
                "login`, or give HF_TOKEN"
            ) from None
    if value is None:
        raise ValueError(
            "no token: give --token or HF_TOKEN, or log in with `hf auth login`; the Hub gives "
            "tokens with the right to write at https://huggingface.co/settings/tokens"
        )
    value = value.strip()
    if len(value) < _SHORTEST or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError(
            f"the token of {origin} is none: it must be one word of ASCII characters, hf_... as a "
            "rule"
        )
    return Token(value, origin)


@contextlib.contextmanager
def kept_secret(token: Token) -> Iterator[None]:
    """Keeps a token out of log records and warnings, whoever writes them, while the block runs."""
    make_record = logging.getLogRecordFactory()

    def make_masked(*arguments: Any, **keywords: Any) -> logging.LogRecord:
        record = make_record(*arguments, **keywords)
        message = record.getMessage()
        if token.masked(message) != message:
            record.msg, record.args = token.masked(message), ()
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            if token.masked(trace) != trace:
                record.exc_info, record.exc_text = None, token.masked(trace)
        return record

    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_masked(message: Warning | str, *rest: Any, **keywords: Any) -> None:
            show(token.masked(str(message)), *rest, **keywords)

        warnings.showwarning = show_masked
        logging.setLogRecordFactory(make_masked)
        try:
            yield
        finally:
            logging.setLogRecordFactory(make_record)


def without_credentials(text: str) -> str:
    """The text with `[removed]` in place of what looks like a key or an address's password."""
    return _CREDENTIAL.sub(REMOVED, text)


def holds_credential(text: str) -> bool:
    """Whether a text holds what looks like a key or an address's password."""
    return _CREDENTIAL.search(text) is not None
