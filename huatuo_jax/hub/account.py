"""Finds the Hub's token and its rights, explains failed calls, and removes secrets from texts."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

_WRITES = "repo.write"
_PROPOSES = "discussion.write"
_MOST_OF_A_MESSAGE = 400
_QUOTA = re.compile(r"storage|quota|\blimit|exceed|upgrade|payment", re.IGNORECASE)
# The Xet client (Rust) raises ConnectionError for a status too, and keeps the Hub's words back.
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})\b")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """The owner of a token, as the Hub tells it.

    Attributes:
        name: the user's or organisation's.
        roles: in each organisation of the user: `admin`, `write`, `contributor` or `read`; None
            where the Hub does not tell.
        token_role: `read`, `write` or `fineGrained`; None where the Hub does not tell.
        permissions: of a fine-grained token: what it may do to each owner or repository, by name.
    """

    name: str
    roles: Mapping[str, str | None]
    token_role: str | None
    permissions: Mapping[str, frozenset[str]]

    @classmethod
    def from_whoami(cls, told: Mapping[str, Any]) -> "Account":
        """Reads the Hub's response to `whoami`.

        Raises:
            KeyError, TypeError, AttributeError: it is no such response.
        """
        token = (told.get("auth") or {}).get("accessToken") or {}
        fine = token.get("fineGrained") or {}
        permissions = {
            str(scope["entity"].get("name", "")).casefold(): frozenset(scope["permissions"])
            for scope in fine.get("scoped") or ()
        }
        organisations = told.get("orgs") or ()
        return cls(
            name=str(told["name"]),
            roles={str(one["name"]): one.get("roleInOrg") for one in organisations},
            token_role=token.get("role"),
            permissions=permissions,
        )

    def owns(self, owner: str) -> bool:
        """Tells whether an owner is the user, or an organisation for which the user may write."""
        if owner.casefold() == self.name.casefold():
            return True
        roles = {name.casefold(): role for name, role in self.roles.items()}
        return owner.casefold() in roles and roles[owner.casefold()] != "read"

    def check_may_write(self, repo: str, *, create_pr: bool) -> None:
        """Raises ValueError where the token cannot write to a repository, OWNER/NAME.

        Args:
            repo: the repository.
            create_pr: a pull request is enough, which others' repositories take too.
        """
        owner = repo.partition("/")[0]
        if self.token_role == "read":
            raise ValueError(
                f"the token of {self.name!r} may only read; make one with the right to write at "
                "https://huggingface.co/settings/tokens"
            )
        if not create_pr and not self.owns(owner):
            others = sorted(name for name in self.roles if self.owns(name))
            raise ValueError(
                f"repo={repo!r} is somebody else's: the token of {self.name!r} may write to "
                f"{', '.join([self.name, *others])}; --create_pr proposes a change to another's"
            )
        if self.token_role == "fineGrained":
            wanted = {_WRITES, _PROPOSES} if create_pr else {_WRITES}
            given = self.permissions.get(owner.casefold(), frozenset())
            given |= self.permissions.get(repo.casefold(), frozenset())
            if not wanted & given:
                raise ValueError(
                    f"the fine-grained token of {self.name!r} lacks the permission to write to "
                    f"{repo!r}; add it at https://huggingface.co/settings/tokens"
                )


def reason_of(error: BaseException, *, endpoint: str) -> str:
    """Explains why a call of huggingface_hub failed; the text may still hold the token.

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
    """Explains an HTTP status, with the Hub's message and the seconds that it asks to wait."""
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
    """Yields an error and its causes."""
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


@dataclasses.dataclass(frozen=True)
class Token:
    """An access token of the Hub.

    Attributes:
        value: the token itself.
        origin: its source, for messages.
    """

    value: str = dataclasses.field(repr=False)
    origin: str

    def masked(self, text: str) -> str:
        """Removes the token and the passwords in addresses from a text."""
        return _USER_OF_ADDRESS.sub(REMOVED, text.replace(self.value, MASK))


def find_token(given: str | None) -> Token:
    """Returns the token of the argument, else of `HF_TOKEN`, else of the stored login.

    Args:
        given: the argument; None if it is not given.

    Raises:
        ValueError: there is none, or it is malformed. The message does not hold it.
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
    """Keeps a token out of all log records and warnings while the block runs."""
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
    """Replaces texts that look like a key or an address's password by `[removed]`."""
    return _CREDENTIAL.sub(REMOVED, text)


def holds_credential(text: str) -> bool:
    """Tells whether a text seems to hold a key or an address's password."""
    return _CREDENTIAL.search(text) is not None
