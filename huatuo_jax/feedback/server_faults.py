"""What it means when a call to a server fails: ask again, give this question up, or stop.

And what such a call may have cost. A server that answers with an error has not worked; but where a
reply was cut off or never came, it may have, and its price is unknown.
"""

import datetime
import email.utils
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import openai

Consequence = Literal["ask again", "give up", "give up unless first", "stop"]

_MOST_OF_A_MESSAGE = 300
_SHORTEST_KEY = 8  # A local server takes any word for a key; "none" is no secret.
_KEY_LIKE = re.compile(r"\bsk-[\w*.-]{4,}")
# Nothing has left this machine. Named by their classes' names, as the library below the openai
# client has changed between its versions.
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})
_TOO_LONG = ("context_length", "context length", "maximum context", "too long")
_FILTERED = ("content_filter", "content_policy", "content management policy")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A failed call.

    Attributes:
        outcome: in a word or two, for the spending file.
        message: for the user, without secrets.
        consequence: what to do; "give up unless first" is to stop where no call has succeeded yet.
        unbilled: certain to cost nothing.
        refused: the server did not take the question at all.
        reached: a server answered, if only with an error.
        wait_s: what the server asked to wait, or 0.
    """

    outcome: str
    message: str
    consequence: Consequence
    unbilled: bool
    refused: bool = False
    reached: bool = True
    wait_s: float = 0.0


def scrubbed(text: str, key: str) -> str:
    """The text without the key, and without what looks like a part of one."""
    if len(key) >= _SHORTEST_KEY:
        text = text.replace(key, "[key]")
    return _KEY_LIKE.sub("[key]", text)


def fault_of(error: Exception, *, key: str, model: str, where: str, timeout_s: float) -> Fault:
    """What a failed call means.

    Args:
        error: as the client raised it.
        key: kept out of every text.
        model: the one asked.
        where: the server, as the user knows it.
        timeout_s: how long a call may take.
    """
    if isinstance(error, openai.APIStatusError):
        message = " ".join(scrubbed(_message(error), key).split())[:_MOST_OF_A_MESSAGE]
        return _status_fault(error, message, model, where)
    cause = type(error.__cause__).__name__
    not_sent = cause in _NOT_SENT
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        outcome, message = "time-out", f"no reply from {where} within {timeout_s:g} s"
    elif not_sent:
        outcome, message = "no connection", f"no server answers at {where}"
    elif isinstance(error, openai.APIConnectionError):
        outcome, message = "broken connection", f"the connection to {where} broke ({cause})"
    else:
        outcome = "broken reply"
        message = f"the reply of {where} cannot be read ({type(error).__name__})"
    return Fault(
        outcome=outcome,
        message=message,
        consequence="ask again",
        unbilled=not_sent,
        refused=not_sent,
        reached=not (not_sent or outcome == "time-out"),
    )


def _status_fault(error: openai.APIStatusError, message: str, model: str, where: str) -> Fault:
    status, code = error.status_code, f"{error.code} {error.type}"
    told = f"HTTP {status}: {message}"
    again, refused = False, True
    consequence: Consequence = "give up unless first"
    if status in (401, 403):
        consequence = "stop"
        told = f"{where} refuses the key in OPENAI_API_KEY ({told})"
    elif status == 404:
        consequence = "stop"
        told = f"{where} does not know the model {model!r}, or is no such server ({told})"
    elif status == 429 and "insufficient_quota" in code:
        consequence, told = "stop", f"{where}: nothing is left to spend there ({told})"
    elif status in (408, 409, 425, 429) or status >= 500:
        consequence, again, refused = "ask again", True, False
    elif any(sign in f"{code} {message}".lower() for sign in (*_TOO_LONG, *_FILTERED)):
        consequence, refused = "give up", False
    return Fault(
        outcome=f"HTTP {status}",
        message=told if consequence == "stop" else f"{where}: {told}",
        consequence=consequence,
        # A gateway that got no answer in time does not know whether there was one.
        unbilled=status not in (408, 502, 504),
        refused=refused,
        wait_s=_wait_s(error.response.headers) if again else 0.0,
    )


def _message(error: openai.APIStatusError) -> str:
    """The server's own words, out of the body's usual shapes."""
    body = error.body
    while isinstance(body, Mapping):
        named = [body[name] for name in ("message", "error", "detail") if name in body]
        if not named:
            break
        body = named[0]
    return body if isinstance(body, str) else str(error.message)


def _wait_s(headers: Mapping[str, str]) -> float:
    """Seconds that Retry-After asks for, given as a number or as a date."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers[name] if name in headers else None
        if value is None:
            continue
        try:
            seconds = float(value) * unit_s
        except ValueError:
            seconds = _until_s(value)
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    return 0.0


def _until_s(date: str) -> float:
    try:
        then = email.utils.parsedate_to_datetime(date)
    except ValueError:
        return 0.0
    if then.tzinfo is None:
        then = then.replace(tzinfo=datetime.UTC)
    return (then - datetime.datetime.now(datetime.UTC)).total_seconds()
