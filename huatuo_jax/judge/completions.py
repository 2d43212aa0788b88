"""Reads the bodies of chat completions and errors, taking only fields of the right type.

The openai client builds its objects from whatever a server sends and checks nothing, so that a
null or another type would surface later as an error of ours. Here a field of a wrong type counts
as absent. Beyond OpenAI's own format this reads text in parts, token counts that leave the
reasoning out, and errors that come with status 200.

The wordings of errors are those of OpenAI, Azure, vLLM, llama.cpp, OpenRouter, LiteLLM, One API,
Anthropic, Gemini, xAI, DeepSeek, Moonshot, DashScope, Zhipu, MiniMax, SiliconFlow and Volcengine,
as far as their documentation and public reports quote them.
"""

import enum
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from huatuo_jax.judge.replies import Token
from huatuo_jax.judge.spending import Usage

# No call has so many; a larger number is not a count of tokens.
_MOST_TOKENS = 10**9
_MOST_OF_A_TEXT = 300
_MOST_SIGNS = 4000  # Characters of an error that are searched for its meaning.
_DEEPEST = 6
# Fields in which servers repeat the request.
_ECHOES = frozenset({"input", "flagged_input", "messages", "prompt", "ctx", "url", "request_id"})
_MESSAGES = ("message", "error", "detail", "msg", "error_msg", "status_msg", "base_resp", "code")
# Parameters of our requests: an error that names one is not about a question's texts.
_PARAMETERS = frozenset(
    "model temperature response_format max_tokens max_completion_tokens logprobs"
    " top_logprobs".split()
)
# The length of the question itself, even if a parameter such as max_tokens is named too.
_OF_TEXT = re.compile(r"context|input|prompt|messages")


class Completion(NamedTuple):
    """A server's reply.

    Attributes:
        text: the reply's text; None for none.
        refusal: the model's words where it refuses to answer; None otherwise.
        finish_reason: in the server's words; None for none.
        tokens: of the text with log-probabilities; None where the server gives none.
        usage: the server's count; None where it gives no valid one.
    """

    text: str | None
    refusal: str | None
    finish_reason: str | None
    tokens: tuple[Token, ...] | None
    usage: Usage | None


class NoCompletion(Exception):
    """The body is an error, or unreadable.

    Attributes:
        body: the error's JSON; None where the body is not JSON.
        usage: the server's count, where the error has one.
    """

    def __init__(
        self, message: str, *, body: Mapping[str, Any] | None = None, usage: Usage | None = None
    ) -> None:
        """Sets the message and the error's body."""
        super().__init__(message)
        self.body, self.usage = body, usage


def read_json(content: bytes) -> Any:
    """Parses a body as JSON; bytes that are not UTF-8 become U+FFFD.

    Raises:
        NoCompletion: it is not JSON.
    """
    text = content.decode("utf-8-sig", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = " ".join(text[:_MOST_OF_A_TEXT].split()) or "nothing"
        raise NoCompletion(f"the body is not JSON, it begins {shown!r}") from error


def read_completion(content: bytes) -> Completion:
    """Reads the body of a reply with status 200.

    A body without a readable choice is a completion without a text: the server has done work.

    Raises:
        NoCompletion: the body is an error, or not a JSON object.
    """
    body = read_json(content)
    if not isinstance(body, dict):
        raise NoCompletion("the body is JSON, but not an object")
    choices = body.get("choices")
    choice = _mapping(choices[0]) if isinstance(choices, list) and choices else {}
    usage = usage_of(body)
    if _is_error(body):
        raise NoCompletion("the body is an error", body=body, usage=usage)
    if choice.get("error"):  # A gateway whose upstream failed in the middle.
        raise NoCompletion("the choice is an error", body=choice, usage=usage)
    message = _mapping(choice.get("message"))
    logprobs = _mapping(choice.get("logprobs"))
    return Completion(
        text=_text_of(message.get("content")),
        refusal=_filled(message.get("refusal")),
        finish_reason=_filled(choice.get("finish_reason")),
        tokens=_tokens_of(logprobs.get("content")),
        usage=usage,
    )


def usage_of(body: Mapping[str, Any]) -> Usage | None:
    """Returns the token counts of a call, or None where the server gives no valid ones.

    Some servers count the reasoning in `total_tokens` but not in `completion_tokens`, or only among
    the details; it is billed as output all the same.
    """
    usage = _mapping(body.get("usage"))
    details = _mapping(usage.get("completion_tokens_details"))
    prompt, completion, total = (
        _count(usage.get(f"{name}_tokens")) for name in ("prompt", "completion", "total")
    )
    if prompt is None or (completion is None and total is None):
        return None
    told = completion or 0
    thoughts = _count(details.get("reasoning_tokens")) or 0
    output = max(
        told,
        (total or 0) - prompt,
        # More reasoning than output: it is not part of it.
        told + thoughts if thoughts > told else 0,
    )
    in_details = _mapping(usage.get("prompt_tokens_details")).get("cached_tokens")
    cached = _count(in_details) or 0
    if cached > prompt:
        return None
    return Usage(input_tokens=prompt, output_tokens=output, cached_tokens=cached)


class Meaning(enum.Enum):
    """The subject of an error.

    The first three, and the request's parameters, concern every question; filters and lengths
    concern one question; a busy server accepts it later.
    """

    NO_MONEY = "no money"
    NO_KEY = "no key"
    NO_MODEL = "no model"
    FILTERED = "filtered"
    TOO_LONG = "too long"
    PARAMETER = "parameter"
    BUSY = "busy"


def meanings_of(body: object) -> frozenset[Meaning]:
    """Returns the subjects of an error by its words, empty where they are unknown."""
    signs = " ".join(_signs_of(body))[:_MOST_SIGNS].lower()
    found = {meaning for meaning, pattern in _SIGNS.items() if pattern.search(signs)}
    if _parameter_of(body) in _PARAMETERS:
        found.add(Meaning.PARAMETER)
    if Meaning.PARAMETER in found and not _OF_TEXT.search(signs):
        found.discard(Meaning.TOO_LONG)
    return frozenset(found)


def status_within(body: object) -> int | None:
    """Returns the HTTP status inside the body of an error that came with status 200, or None."""
    for part in (body, body.get("error") if isinstance(body, Mapping) else None):
        for name in ("status", "status_code", "code"):
            value = part.get(name) if isinstance(part, Mapping) else None
            text = str(value) if isinstance(value, int | str) else ""
            if re.fullmatch(r"[45]\d\d", text):
                return int(text)
    return None


def words_of(body: object, depth: int = 0) -> str | None:
    """Returns the server's own words from the body's usual formats, or None."""
    if isinstance(body, str):
        return body if body.strip() else None
    if depth > _DEEPEST:
        return None
    inner: list[Any] = []
    if isinstance(body, Mapping):
        inner = [body[name] for name in _MESSAGES if name in body]
        metadata = body.get("metadata")
        if isinstance(metadata, Mapping):  # OpenRouter quotes the provider behind it.
            raw = [metadata[name] for name in ("raw", "reasons") if name in metadata]
            said = [words_of(part, depth + 1) for part in (*inner[:1], *raw)]
            return " ".join(filter(None, said)) or None
    elif isinstance(body, list):
        inner = body
    return next(filter(None, (words_of(part, depth + 1) for part in inner)), None)


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns))


# In lower case.
_SIGNS: Mapping[Meaning, re.Pattern[str]] = {
    Meaning.NO_MONEY: _any(
        r"insufficient[ _-]?(user[ _-]?)?(account[ _-]?)?(quota|balance|credit|fund)",
        r"balance (is )?(too low|insufficient|not enough)",
        r"not enough (balance|credit|quota)|quota is not enough",
        r"requires more credits|out of credits|exceeded_current_quota",
        r"billing[ _](hard[ _]limit|not[ _]active)|check your billing details",
        r"payment[ _]required|arrearage|overdue|in arrears|freetieronly",
        r"budget[ _]?(has been )?exceeded|spend(ing)?[ _-]limit",
        "余额|欠费|额度不足|额度已|配额不足|资源包",
    ),
    Meaning.NO_KEY: _any(
        r"(invalid|incorrect|wrong|expired|missing|no)[ _-]api[ _-]?key",
        r"api[ _-]?key (is )?(not valid|invalid|expired)|api_key_invalid",
        r"authentication|login fail|unauthorized",
        r"account[ _](is |has been )?(deactivated|disabled|suspended|banned)",
        "令牌|密钥",
    ),
    Meaning.NO_MODEL: _any(
        r"model[ _]?(not[ _]?(found|exist|supported)|does not exist)",
        r"models? [^.]{0,120}?(does not exist|not exist|not found|is not supported|not a valid)",
        r"not a valid model|no available channel",
        r"(unknown|invalid|unsupported|no such)[ _]model\b(?! ?(output|response))",
        "模型不存在|无可用渠道",
    ),
    Meaning.FILTERED: _any(
        r"content[ _-]?(filter|policy|management|moderation|safety|blocked|exists risk)",
        r"data[ _-]?inspection[ _-]?failed|inappropriate|prohibited|harmful|unsafe",
        r"sensitive[ _-]?(content|word|info|data|text)|new_sensitive|responsible ?ai",
        r"moderat|flagged|high risk|blocked by|policy[ _]violation|violat",
        r"(usage|safety)[ _](polic|guideline|system)|safety (filter|setting|reason)",
        "敏感|违规|违禁|不安全|风险|审核|不合规",
    ),
    Meaning.TOO_LONG: _any(
        r"context[ _-]?(length|size|window)|maximum context|reduce the length|longer than",
        r"too long|too large|too many (input )?tokens|maximum (number of )?tokens",
        r"input length|length of the input|max(imum)?[ _]?(input|prompt)|string_above_max",
        r"(token|length|input|prompt|size)s? [^.]{0,40}?exceed",
        r"exceeds? [^.]{0,40}?(token|length|limit)",
        "上下文|超长|过长|超出.{0,12}(长度|限制)",
    ),
    Meaning.PARAMETER: _any(
        r"response_format|json_schema|max_tokens|max_completion_tokens|top_logprobs|logprobs",
        r"(unsupported|unknown|unrecognized)[ _](value|parameter|argument)",
    ),
    Meaning.BUSY: _any(
        r"rate[ _-]?limit|too many (requests|concurrent)|per minute|overload|capacity|busy",
        r"try again|retry|time[ _-]?out",
        "频率|限流|繁忙|稍后|重试",
    ),
}


def _is_error(body: Mapping[str, Any]) -> bool:
    """Returns True if a body is an error in the format of one server or another."""
    # MiniMax has a status in every body, 0 for success.
    status = _mapping(body.get("base_resp")).get("status_code")
    if body.get("error") or body.get("object") == "error" or status not in (None, 0, "0"):
        return True
    named = [body.get(name) for name in ("message", "msg", "detail", "error_msg")]
    return not body.get("choices") and (body.get("success") is False or any(named))


def _text_of(content: Any) -> str | None:
    """Returns a message's text, also from parts, without parts that are reasoning."""
    if isinstance(content, list):
        parts = [_mapping(part) for part in content]
        texts = [part.get("text") for part in parts if part.get("type") in ("text", "output_text")]
        return "".join(text for text in texts if isinstance(text, str)) or None
    return content if isinstance(content, str) else None


def _tokens_of(content: Any) -> tuple[Token, ...] | None:
    if not isinstance(content, list) or not content:
        return None
    tokens = []
    for entry in map(_mapping, content):
        text = _bytes_of(entry)
        if text is None:
            return None  # With a token missing, the position of the others is uncertain.
        others = entry.get("top_logprobs")
        alternatives = {}
        for one in (entry, *map(_mapping, others if isinstance(others, list) else ())):
            other, log_prob = _bytes_of(one), one.get("logprob")
            if other is not None and isinstance(log_prob, int | float) and _is_number(log_prob):
                alternatives[other] = float(log_prob)
        tokens.append(Token(text, alternatives))
    return tuple(tokens)


def _bytes_of(entry: Mapping[str, Any]) -> bytes | None:
    numbers, text = entry.get("bytes"), entry.get("token")
    if isinstance(numbers, list) and all(
        isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 256 for one in numbers
    ):
        return bytes(numbers)
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else None


def _count(value: Any) -> int | None:
    """Returns a count of tokens, also where a server writes it as 12.0."""
    if not _is_number(value) or not 0 <= value <= _MOST_TOKENS or value != int(value):
        return None
    return int(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # An integer of a thousand digits has no float.
    return abs(value) <= 1e300 and math.isfinite(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _filled(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _parameter_of(body: object) -> object:
    """Returns the parameter that an error names in OpenAI's format, or None."""
    inner = body.get("error", body) if isinstance(body, Mapping) else None
    name = inner.get("param") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


def _signs_of(body: object, depth: int = 0) -> Iterator[str]:
    """Yields all texts and names of an error, except what repeats the question."""
    if isinstance(body, Mapping) and depth <= _DEEPEST:
        for name, value in body.items():
            echo = name in _ECHOES
            # A repeated text has no meaning, but that it is flagged has.
            yield "" if echo and name != "flagged_input" else str(name)
            yield from () if echo else _signs_of(value, depth + 1)
    elif isinstance(body, list) and depth <= _DEEPEST:
        for value in body:
            yield from _signs_of(value, depth + 1)
    elif isinstance(body, str):
        yield body
