"""What a failed call to the Hub means, in one line."""

import json
import re
from collections.abc import Iterator

from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

_MOST_OF_A_MESSAGE = 400
_QUOTA = re.compile(r"storage|quota|\blimit|exceed|upgrade|payment", re.IGNORECASE)
# The Xet client (Rust) raises ConnectionError for a status too, and keeps the Hub's words back.
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})\b")


def reason_of(error: BaseException, *, endpoint: str) -> str:
    """Why a call of huggingface_hub failed, and what to do; the text may still hold the token.

    Args:
        error: as the library raised it.
        endpoint: the Hub that was asked.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            said = _one_line(cause.server_message or "")
            wait = cause.response.headers.get("Retry-After")
            return _of_status(cause.response.status_code, said, wait)
        if status := _XET_STATUS.search(str(cause)):
            return _of_status(int(status[1]), "", None)
    for cause in causes:
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so that nothing may be sent; unset it"
        if isinstance(cause, json.JSONDecodeError):
            return f"{endpoint} answers with something that is not JSON; is this a Hub?"
        if isinstance(cause, HTTPError | ConnectionError | TimeoutError):
            return f"{endpoint} cannot be reached ({_named(cause)}); check network and proxy"
    return _named(error)


def _of_status(status: int, said: str, wait: str | None) -> str:
    """What a status of HTTP means, with the Hub's words and the seconds that it asks to wait."""
    meaning = {
        400: "the Hub refuses it",
        401: "the Hub does not accept the token, or hides the repository from it",
        402: "the plan or storage quota of the account does not allow it",
        403: "the token may not do this" if said else "the token may not, or the quota is full",
        404: "the Hub has no such repository or revision, or hides it from this token",
        409: "something else is at work on the repository, or it is there already",
        412: "the repository has changed meanwhile",
        413: "it is too large for the Hub, or the storage quota is full",
        429: "the Hub's rate limit is reached",
    }.get(status, "the Hub has failed" if status >= 500 else "the Hub refuses it")
    if status == 403 and _QUOTA.search(said):
        meaning = "the storage quota of the account is full"
    advice = ""
    if status == 429:
        advice = f"; wait {wait} s" if wait and wait.isdigit() else "; wait some minutes"
    if status >= 500:
        advice = "; wait a while"
    return f"{meaning} (HTTP {status}{f': {said}' if said else ''}){advice}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was made of."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _named(error: BaseException) -> str:
    said = _one_line(str(error))
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_OF_A_MESSAGE else f"{line[:_MOST_OF_A_MESSAGE]}..."
