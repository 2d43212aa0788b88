"""What it means when a call to a server fails: ask again, give this question up, or stop.

Servers have few statuses and many words. What they say decides first: of money, a key or a model
they speak where every question would meet the same, of filters and lengths where this question is
the matter. Where the words say neither, only another question's answer can tell: such a fault is
this question's, and ends the run where so many questions have met it and none was answered.

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

from huatuo_jax.feedback.completions import NoCompletion, read_json
from huatuo_jax.feedback.error_bodies import Meaning, meanings_of, status_within, words_of
from huatuo_jax.feedback.judgements import printable
from huatuo_jax.feedback.spending import Usage

# "give up": this question. "stop": every question meets it; "stop unless answered": unless another
# was answered before.
Consequence = Literal["ask again", "give up", "stop unless answered", "stop"]

_MOST_OF_A_MESSAGE = 300
# A filter may refuse any question, the first ones too; refusals cost nothing.
_UNCLEAR_ENDS_AFTER = 20
_FORBIDDEN_ENDS_AFTER = 3  # Mostly a key without the right to ask.
_LONGEST_WAIT_S = 366 * 24 * 3600.0  # What asks for more is no number of seconds.
_SHORTEST_KEY = 8  # A local server takes any word for a key; "none" is no secret.
# In ASCII alone: Chinese writes no blank before a key, and its characters are letters too.
_KEY_LIKE = re.compile(r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_*.-]{4,}")
# Nothing has left this machine. Named by their classes' names, as the library below the openai
# client has changed between its versions.
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout"})


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A failed call.

    Attributes:
        outcome: in a word or two, for the spending file.
        message: for the user, without secrets, with the server's own words.
        consequence: what to do.
        ends_after: questions without an answer to any that it takes for this to be more than one
            question's; None where one is enough, or none are.
        unbilled: certain to cost nothing.
        refused: the server did not take the question at all.
        reached: a server answered, if only with an error.
        wait_s: what the server asked to wait, or 0.
        usage: tokens that the server counted all the same.
    """

    outcome: str
    message: str
    consequence: Consequence
    ends_after: int | None = None
    unbilled: bool
    refused: bool = False
    reached: bool = True
    wait_s: float = 0.0
    usage: Usage | None = None


def scrubbed(text: str, key: str) -> str:
    """The text without the key, and without what looks like a part of one."""
    if len(key) >= _SHORTEST_KEY:
        text = text.replace(key, "[key]")
    return _KEY_LIKE.sub("[key]", text)


def fault_of(error: Exception, *, key: str, model: str, where: str, timeout_s: float) -> Fault:
    """What a failed call means.

    Args:
        error: as the client or the reader of the body raised it; whatever it is.
        key: kept out of every text.
        model: the one asked.
        where: the server, as the user knows it.
        timeout_s: how long a call may take.
    """

    def told(words: str) -> str:
        return printable(scrubbed(words, key))[:_MOST_OF_A_MESSAGE]

    if isinstance(error, openai.APIStatusError):
        body = _body_of(error)
        message = told(words_of(body) or str(error.message))
        wait_s = _wait_s(error.response.headers)
        return _error_fault(error.status_code, body, message, model, where, wait_s)
    if isinstance(error, NoCompletion) and error.body is not None:
        message = told(words_of(error.body) or str(error.body))
        return _error_fault(None, error.body, message, model, where, 0.0, error.usage)
    cause = type(error.__cause__).__name__
    not_sent = cause in _NOT_SENT
    if isinstance(error, TimeoutError | openai.APITimeoutError) and not not_sent:
        outcome, message = "time-out", f"no reply from {where} within {timeout_s:g} s"
    elif not_sent:
        outcome, message = "no connection", f"no server answers at {where}"
    elif isinstance(error, openai.APIConnectionError):
        outcome, message = "broken connection", f"the connection to {where} broke ({cause})"
    else:
        said = str(error) if isinstance(error, NoCompletion) else type(error).__name__
        outcome, message = "broken reply", f"the reply of {where} cannot be read: {told(said)}"
    return Fault(
        outcome=outcome,
        message=message,
        consequence="ask again",
        unbilled=not_sent,
        refused=not_sent,
        reached=not (not_sent or outcome == "time-out"),
    )


def _body_of(error: openai.APIStatusError) -> object:
    """The body of an error as it came: the client reads none behind a byte order mark."""
    try:
        return read_json(error.response.content)
    except NoCompletion:
        return error.body


def _error_fault(
    status: int | None,
    body: object,
    message: str,
    model: str,
    where: str,
    wait_s: float,
    usage: Usage | None = None,
) -> Fault:
    """What an error that a server tells means.

    Args:
        status: None where the error came with status 200, so that the server may have worked.
        body: of the error.
        message: of it, for the user.
        model: the one asked.
        where: the server.
        wait_s: what its headers ask to wait.
        usage: that it counted.
    """
    http = "an error with HTTP 200" if status is None else f"HTTP {status}"
    meant = status_within(body) if status is None else status
    consequence, reason, ends_after = _consequence(meant, meanings_of(body), model)
    told = f" {reason} ({http}: {message})" if reason else f": {http}: {message}"
    stops = consequence in ("stop", "stop unless answered")
    return Fault(
        outcome=http,
        message=f"{where}{told}",
        consequence=consequence,
        # A gateway that got no answer in time does not know whether there was one.
        unbilled=status not in (None, 408, 502, 504),
        ends_after=ends_after,
        refused=status is not None and (stops or ends_after is not None),
        wait_s=wait_s if consequence == "ask again" else 0.0,
        usage=usage,
    )


def _consequence(
    status: int | None, meanings: frozenset[Meaning], model: str
) -> tuple[Consequence, str, int | None]:
    """What to do about an error, what it is in our words where those are known, `ends_after`."""
    failing = status is None or status >= 500
    busy = status in (408, 409, 425, 429) or (
        (failing or status == 403) and Meaning.BUSY in meanings
    )
    if status == 402 or Meaning.NO_MONEY in meanings:
        return "stop", "has nothing left for this key to spend", None
    if status == 401 or (not busy and Meaning.NO_KEY in meanings):
        return "stop", "refuses the key in OPENAI_API_KEY", None
    no_model = f"does not know the model {model!r}, or is no such server"
    if not busy and Meaning.NO_MODEL in meanings:
        return "stop", no_model, None
    if status in (404, 405):
        return "stop unless answered", no_model, None
    if busy:
        return "ask again", "", None
    if status in (413, 451) or meanings & {Meaning.FILTERED, Meaning.TOO_LONG}:
        return "give up", "will not judge this question", None
    if failing:
        return "ask again", "", None
    if status == 403:
        told = "refuses the key in OPENAI_API_KEY, or this question"
        return "give up", told, _FORBIDDEN_ENDS_AFTER
    if Meaning.PARAMETER in meanings:
        return "stop unless answered", "does not take the request as it is", None
    return "give up", "refuses this question", _UNCLEAR_ENDS_AFTER


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
        if math.isfinite(seconds) and 0 < seconds <= _LONGEST_WAIT_S:
            return seconds
    return 0.0


def _until_s(date: str) -> float:
    try:
        then = email.utils.parsedate_to_datetime(date)
    except (ValueError, OverflowError, TypeError, IndexError):
        return 0.0  # Numbers that no calendar has, of any size.
    if then.tzinfo is None:
        then = then.replace(tzinfo=datetime.UTC)
    return (then - datetime.datetime.now(datetime.UTC)).total_seconds()
