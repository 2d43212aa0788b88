"""What a server's error says: its own words, and what they mean in the wording of real servers.

Of OpenAI, Azure, vLLM, llama.cpp, OpenRouter, LiteLLM, One API, Anthropic, Gemini, xAI, DeepSeek,
Moonshot, DashScope, Zhipu, MiniMax, SiliconFlow and Volcengine, as far as their documentation and
public reports quote them.
"""

import enum
import re
from collections.abc import Iterator, Mapping
from typing import Any

_MOST_SIGNS = 4000  # Characters of an error that are searched for what it means.
_DEEPEST = 6
# Fields in which servers repeat what they were asked.
_ECHOES = frozenset({"input", "flagged_input", "messages", "prompt", "ctx", "url", "request_id"})
_MESSAGES = ("message", "error", "detail", "msg", "error_msg", "status_msg", "base_resp", "code")
# Parameters of our requests: an error that names one is none of a question's texts.
_PARAMETERS = frozenset(
    "model temperature response_format max_tokens max_completion_tokens logprobs"
    " top_logprobs".split()
)


class Meaning(enum.Enum):
    """What an error is about.

    The first three and the parameters of the request are the same in every question; filters and
    lengths are one question's; a busy server will take it later.
    """

    NO_MONEY = "no money"
    NO_KEY = "no key"
    NO_MODEL = "no model"
    FILTERED = "filtered"
    TOO_LONG = "too long"
    PARAMETER = "parameter"
    BUSY = "busy"


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
# A length that is the question's own, though a parameter such as max_tokens is named beside it.
_OF_TEXT = re.compile(r"context|input|prompt|messages")


def meanings_of(body: object) -> frozenset[Meaning]:
    """What an error is about, by its words; none where they are not known."""
    signs = " ".join(_signs_of(body))[:_MOST_SIGNS].lower()
    found = {meaning for meaning, pattern in _SIGNS.items() if pattern.search(signs)}
    if _parameter_of(body) in _PARAMETERS:
        found.add(Meaning.PARAMETER)
    if Meaning.PARAMETER in found and not _OF_TEXT.search(signs):
        found.discard(Meaning.TOO_LONG)
    return frozenset(found)


def status_within(body: object) -> int | None:
    """The HTTP status of an error that came with status 200, by its body; None where none."""
    for part in (body, body.get("error") if isinstance(body, Mapping) else None):
        for name in ("status", "status_code", "code"):
            value = part.get(name) if isinstance(part, Mapping) else None
            text = str(value) if isinstance(value, int | str) else ""
            if re.fullmatch(r"[45]\d\d", text):
                return int(text)
    return None


def words_of(body: object, depth: int = 0) -> str | None:
    """The server's own words, out of the body's usual shapes; None where there are none."""
    if isinstance(body, str):
        return body if body.strip() else None
    if depth > _DEEPEST:
        return None
    inner: list[Any] = []
    if isinstance(body, Mapping):
        inner = [body[name] for name in _MESSAGES if name in body]
        metadata = body.get("metadata")
        if isinstance(metadata, Mapping):  # OpenRouter: the words of the provider behind it.
            raw = [metadata[name] for name in ("raw", "reasons") if name in metadata]
            said = [words_of(part, depth + 1) for part in (*inner[:1], *raw)]
            return " ".join(filter(None, said)) or None
    elif isinstance(body, list):
        inner = body
    return next(filter(None, (words_of(part, depth + 1) for part in inner)), None)


def _parameter_of(body: object) -> object:
    """The parameter that an error names, as OpenAI writes it."""
    inner = body.get("error", body) if isinstance(body, Mapping) else None
    name = inner.get("param") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


def _signs_of(body: object, depth: int = 0) -> Iterator[str]:
    """All texts and names of an error, less what repeats the question."""
    if isinstance(body, Mapping) and depth <= _DEEPEST:
        for name, value in body.items():
            echo = name in _ECHOES
            # That a text is repeated says nothing, but that it is flagged does.
            yield "" if echo and name != "flagged_input" else str(name)
            yield from () if echo else _signs_of(value, depth + 1)
    elif isinstance(body, list) and depth <= _DEEPEST:
        for value in body:
            yield from _signs_of(value, depth + 1)
    elif isinstance(body, str):
        yield body
