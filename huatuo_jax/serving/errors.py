"""Errors of the server, in OpenAI's shape."""

from typing import Any, NoReturn

import pydantic

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_SERVER = "server_error"


class ApiError(Exception):
    """A request that is refused, or has failed; the message is one line."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """Describes the error.

        Args:
            status: of HTTP.
            message: one line.
            param: the field of the request that it is about.
            code: a name for programs.
            retry_after_s: when to ask again.
        """
        self.message = " ".join(message.split())
        super().__init__(self.message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Returns the headers of its response."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}

    def to_json(self) -> dict[str, Any]:
        """Returns the body of its response."""
        kind = _TYPES.get(self.status, _SERVER if self.status >= 500 else _TYPES[400])
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def refuse(param: str, message: str) -> NoReturn:
    """Raises the error for an invalid value of a field of the request."""
    raise ApiError(400, f"{param}: {message}", param=param)


def of_validation(error: pydantic.ValidationError) -> ApiError:
    """Returns the error for a body that has not the fields of its model.

    It names the first wrong field. Of a field with several types, all reasons are given.
    """
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        return ApiError(
            400, f"the body is no JSON: {problems[0]['msg'].removeprefix('Invalid JSON: ')}"
        )
    first = _field_of(problems[0]["loc"])
    reasons = [_reason(one) for one in problems if _field_of(one["loc"]) == first]
    words = "; or ".join(dict.fromkeys(reasons))
    return ApiError(400, f"{first}: {words}" if first else f"the body: {words}", param=first)


def _field_of(location: tuple[int | str, ...]) -> str | None:
    """Returns the name of the outermost field, with its places in lists and their fields.

    pydantic puts the type that it tried behind the name of a field that has several.
    """
    name = ""
    for part in location:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part in _TRIED or "[" in part or part.startswith("constrained-"):
            break
        else:
            name += f".{part}" if name else part
    return name or None


_TRIED = ("str", "int", "float", "bool")


def _reason(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Input ")
    return message[:1].lower() + message[1:]
