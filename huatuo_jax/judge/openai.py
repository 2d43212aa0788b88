"""A judge behind an OpenAI-compatible server: OpenAI's own, vLLM or any other.

A prompt template is a UTF-8 file with the lines `[system]` and `[user]`, each before its message,
and with placeholders such as `{{dialogue}}`, all filled in one pass, so that no text is mistaken
for a placeholder. `{{mark}}` is a number that depends on the texts: a writer who wants to break out
of the marks around a text would have to know it beforehand.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from huatuo_jax.core.files import as_path
from huatuo_jax.data.records import Prompt
from huatuo_jax.judge import judgements, replies
from huatuo_jax.judge.completions import Completion
from huatuo_jax.judge.judgements import Estimate, JudgementFailed, Protocol, Reply, sha256
from huatuo_jax.judge.server import Server, ServerConfig, Taken, scrubbed
from huatuo_jax.judge.spending import SHIPPED, Price, Totals, Usage, read_price

_FOLDER = pathlib.Path(__file__).with_name("prompts")
_PLACE = re.compile(r"\{\{(\w+)\}\}")
_REQUIRED: Mapping[Protocol, frozenset[str]] = {
    "score": frozenset({"dialogue", "reference", "answer", "low", "high"}),
    "pairwise": frozenset({"dialogue", "reference", "first", "second"}),
}
_SPEAKERS = {"system": "系统", "user": "患者", "assistant": "医生"}
_NO_REFERENCE = "（没有参考，请以医学共识为准。）"
_HASH_DIGITS = 16
_MARK_DIGITS = 8
# A byte-level tokenizer makes at most one token per byte; these cover the tokens that a server's
# chat template and its own system text add.
_MAX_TOKENS_A_MESSAGE = 16
_MAX_TOKENS_A_CALL = 256
# Typical of today's tokenizers for Chinese and for other text.
_TOKENS_A_WIDE_CHARACTER = 0.8
_TOKENS_A_NARROW_CHARACTER = 0.3
_WIDE = re.compile(r"[\u2e80-\uffff]")
_TOP_LOG_PROBS = 20
_NO_LOG_PROBS_ENDS_AFTER = 3  # Replies, without a verdict on any question.


@dataclass(frozen=True)
class JudgePrompt:
    """A parsed template.

    Attributes:
        protocol: the protocol it is for.
        system: the system message, with placeholders.
        user: the user message, with placeholders.
        hash: of the file's text.
    """

    protocol: Protocol
    system: str
    user: str
    hash: str

    def render(
        self,
        prompt: Prompt,
        texts: Sequence[str],
        *,
        low: int,
        high: int,
        require_reference: bool = True,
    ) -> list[dict[str, str]]:
        """Returns the messages that ask about one text (a score) or two (a comparison).

        Args:
            prompt: the whole dialogue before the answer, and the doctor's answer or diagnosis.
            texts: the answers, in the order shown.
            low: the worst score.
            high: the best score.
            require_reference: refuse a prompt with neither a doctor's answer nor a diagnosis.

        Raises:
            ValueError: there is no reference.
        """
        if require_reference and not (_given(prompt.reference) or _given(prompt.diagnosis)):
            raise ValueError(
                f"prompt {prompt.id!r} has neither a reference nor a diagnosis for the judge to"
                " use; --norequire_reference judges without"
            )
        dialogue = "\n".join(f"{_SPEAKERS[one.role]}：{one.content}" for one in prompt.messages)
        values = {
            "dialogue": dialogue,
            "reference": _reference(prompt),
            "low": str(low),
            "high": str(high),
            "mark": sha256("\0".join([dialogue, *texts]))[:_MARK_DIGITS],
            **dict(zip(judgements.INDEX_NAMES[self.protocol], texts, strict=True)),
        }
        return [
            {"role": role, "content": _sendable(_PLACE.sub(lambda place: values[place[1]], part))}
            for role, part in (("system", self.system), ("user", self.user))
            if part
        ]


def read_judge_prompt(
    protocol: Protocol, path: str | os.PathLike[str] | None = None
) -> JudgePrompt:
    """Reads a template file.

    Args:
        protocol: the protocol it is for.
        path: the user's file; None for the shipped one.

    Raises:
        ValueError: no such file, no `[user]` part, an unknown placeholder, or a missing one.
    """
    path = _FOLDER / f"{protocol}.txt" if path is None else as_path(path)
    if not path.is_file():
        raise ValueError(f"judge's template: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"judge's template {path} should be UTF-8: {error}") from error
    system, user = template_parts(text, path)
    places = set(_PLACE.findall(system + user))
    lacking = sorted(_REQUIRED[protocol] - places)
    unknown = sorted(places - _REQUIRED[protocol] - {"mark", "low", "high"})
    if lacking or unknown:
        wrong = f"lacks {{{{{lacking[0]}}}}}" if lacking else f"has unknown {{{{{unknown[0]}}}}}"
        names = ", ".join(sorted(_REQUIRED[protocol]))
        raise ValueError(f"judge's template {path} {wrong}; for {protocol} it needs {names}")
    return JudgePrompt(protocol, system, user, sha256(text)[:_HASH_DIGITS])


@dataclass(frozen=True, kw_only=True)
class OpenAIJudgeConfig:
    """The judge's model, its requests and its server.

    Attributes:
        model: the model's name on the server; the judge's name in every record.
        server: its address and limits.
        structured: "json_schema" or "json_object" where the server can enforce a reply format.
        log_probs: take a comparison's probability from the verdict's token. A judgement whose
            probability is unreadable, or contradicts the verdict of its reply, fails: a verdict of
            1 or 0 must not be mixed with probabilities. Use temperature 0, at which the likeliest
            verdict is the one given.
        temperature: None to leave it to the server.
        max_tokens: tokens of a reply at most.
        max_tokens_field: the name of this parameter on the server.
        low: the worst score.
        high: the best score.
        score_template: file; None for the shipped one.
        pairwise_template: file; None for the shipped one.
        require_reference: refuse prompts with neither a doctor's answer nor a diagnosis.
        prices: file of the price table; None for the shipped one.
    """

    model: str
    server: ServerConfig = field(default_factory=ServerConfig)
    structured: replies.Structured = "json_schema"
    log_probs: bool = False
    temperature: float | None = 0.0
    max_tokens: int = 1024
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    low: int = 1
    high: int = 5
    score_template: str | None = None
    pairwise_template: str | None = None
    require_reference: bool = True
    prices: str | None = None

    def __post_init__(self) -> None:
        """Validates the fields."""
        if not self.model:
            raise ValueError("model is empty; it should be the name of a model on the server")
        for name, choices in (
            ("structured", get_args(replies.Structured)),
            ("max_tokens_field", ("max_tokens", "max_completion_tokens")),
        ):
            if getattr(self, name) not in choices:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(choices)}")
        if not 0 <= self.low < self.high:
            raise ValueError(f"low={self.low} and high={self.high} should be 0 <= low < high")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")


class OpenAIJudge:
    """Asks a language model behind a server; see `judgements.Judge`."""

    def __init__(
        self, cfg: OpenAIJudgeConfig, *, key: str, spending: str | os.PathLike[str] | None
    ) -> None:
        """Reads templates, prices and the spending of earlier runs; sends nothing.

        Args:
            cfg: the model and its server.
            key: for the server, see `server.key_from_environment`.
            spending: the spending file; None to count this run alone.

        Raises:
            ValueError: an invalid template, price table or spending file, or a budget of money for
                a model without a price.
        """
        self._cfg, self._key = cfg, key
        self._prompts: dict[judgements.Protocol, JudgePrompt] = {
            "score": read_judge_prompt("score", cfg.score_template),
            "pairwise": read_judge_prompt("pairwise", cfg.pairwise_template),
        }
        self.price: Price | None = read_price(cfg.model, cfg.prices)
        max_cost = cfg.server.budget.max_cost
        if self.price is None and max_cost is not None:
            raise ValueError(
                f"max_cost={max_cost:g} needs a price, and {cfg.prices or SHIPPED} has none for"
                f" {cfg.model!r}: add it to a copy of the table and name the copy by --prices"
            )
        self._server = Server(cfg.server, key=key, price=self.price, spending=spending)
        self._has_log_probs = False  # True once any reply had them.

    @property
    def name(self) -> str:
        """Returns the model's name."""
        return self._cfg.model

    @property
    def settings(self) -> Mapping[str, Any]:
        """Returns the settings that decide the verdicts.

        The server's address is not one of them: a server may move. Neither is the token limit of a
        reply: a truncated reply is a failed judgement.
        """
        names = ("model", "structured", "log_probs", "temperature", "low", "high")
        return {name: getattr(self._cfg, name) for name in names}

    @property
    def totals(self) -> Totals:
        """Returns the sums over all calls, of this run and earlier ones."""
        return self._server.totals

    def spent(self) -> str:
        """Returns the spending of all calls of the labels file, for the user."""
        totals = self.totals
        tokens = f"{totals.usage.input_tokens} tokens in, {totals.usage.output_tokens} out"
        text = f"spent in all runs: {totals.requests} requests, {tokens}"
        if self.price is not None:
            text += f", {totals.cost:.6g} {self.price.currency}"
        if totals.unknown_requests:
            text += f"; the cost of {totals.unknown_requests} requests is unknown"
            if self.price is not None:
                text += f" ({totals.unknown_cost:.6g} at most)"
        return text

    def template_hash(self, protocol: judgements.Protocol) -> str:
        """Returns the hash of the template file."""
        return self._prompts[protocol].hash

    def estimate(self, prompt: Prompt, texts: Sequence[str]) -> Estimate:
        """Estimates the cost of a question; see `judgements.Judge`."""
        return self._estimate(self._request(prompt, texts))

    async def score(self, prompt: Prompt, answer: str) -> Reply:
        """Scores an answer; see `judgements.Judge`."""
        return await self._ask(prompt, [answer], self._read_scores)

    async def compare(self, prompt: Prompt, first: str, second: str) -> Reply:
        """Returns how likely the first answer is the better one; see `judgements.Judge`."""
        return await self._ask(prompt, [first, second], self._read_verdict)

    async def close(self) -> None:
        """Closes connections and the spending file."""
        await self._server.close()

    async def _ask(
        self,
        prompt: Prompt,
        texts: Sequence[str],
        read: Callable[[Completion, str], Mapping[str, Any]],
    ) -> Reply:
        taken = Taken()
        request = self._request(prompt, texts)
        completion = await self._server.complete(request, self._estimate(request), taken)
        # The key is removed in case the reply holds it.
        text = scrubbed(completion.text or completion.refusal or "", self._key)
        failure: judgements.Failure = "unreadable"
        ends_after: int | None = None
        try:
            return Reply(**read(completion, text), raw=text, **taken.fields())
        except replies.BadReply as bad:
            error: Exception = bad
            message, failure = str(bad), bad.failure
            if isinstance(bad, _NoLogProbs) and not self._has_log_probs:
                ends_after = _NO_LOG_PROBS_ENDS_AFTER
        except Exception as other:  # A paid reply is recorded whatever it holds.
            error, message = other, f"the reply is unreadable: {type(other).__name__}: {other}"
        raise JudgementFailed(
            message,
            raw=text,
            failure=failure,
            max_tokens=self._cfg.max_tokens if failure == "truncated" else None,
            ends_after=ends_after,
            **taken.fields(),
        ) from error

    def _read_scores(self, completion: Completion, text: str) -> Mapping[str, Any]:
        _check_whole(completion)
        return replies.parse_score(text, low=self._cfg.low, high=self._cfg.high)._asdict()

    def _read_verdict(self, completion: Completion, text: str) -> Mapping[str, Any]:
        _check_whole(completion)
        verdict = replies.parse_verdict(text)
        if not self._cfg.log_probs:
            return verdict._asdict()
        if completion.tokens is None:
            raise _NoLogProbs(
                f"the server gives no log-probabilities with {self.name!r}: ask without log_probs"
            )
        self._has_log_probs = True
        p_first = replies.verdict_probability(completion.tokens, text)
        return verdict._replace(p_first=p_first)._asdict()

    def _request(self, prompt: Prompt, texts: Sequence[str]) -> dict[str, Any]:
        cfg = self._cfg
        protocol: judgements.Protocol = "score" if len(texts) == 1 else "pairwise"
        request: dict[str, Any] = {
            "model": cfg.model,
            "messages": self._prompts[protocol].render(
                prompt,
                texts,
                low=cfg.low,
                high=cfg.high,
                require_reference=cfg.require_reference,
            ),
            cfg.max_tokens_field: cfg.max_tokens,
        }
        if cfg.temperature is not None:
            request["temperature"] = cfg.temperature
        form = replies.response_format(protocol, cfg.structured, low=cfg.low, high=cfg.high)
        if form is not None:
            request["response_format"] = form
        if cfg.log_probs and protocol == "pairwise":
            request |= {"logprobs": True, "top_logprobs": _TOP_LOG_PROBS}
        return request

    def _estimate(self, request: Mapping[str, Any]) -> Estimate:
        return request_estimate(request, max_tokens=self._cfg.max_tokens, price=self.price)


def request_estimate(
    request: Mapping[str, Any], *, max_tokens: int, price: Price | None
) -> Estimate:
    """Returns what a chat request may take.

    Args:
        request: its body.
        max_tokens: of the reply.
        price: of the model; None where it is not known.
    """
    texts = [message["content"] for message in request["messages"]]
    # Some servers put the form of the reply into the prompt.
    form = json.dumps(request["response_format"]) if "response_format" in request else ""
    num_wide = sum(len(_WIDE.findall(text)) for text in texts)
    num_narrow = sum(map(len, texts)) + len(form) - num_wide
    about = round(_TOKENS_A_WIDE_CHARACTER * num_wide + _TOKENS_A_NARROW_CHARACTER * num_narrow)
    at_most = sum(len(text.encode("utf-8", "surrogatepass")) for text in (*texts, form))
    at_most += _MAX_TOKENS_A_MESSAGE * len(texts) + _MAX_TOKENS_A_CALL

    def cost(input_tokens: int) -> float | None:
        usage = Usage(input_tokens=input_tokens, output_tokens=max_tokens)
        return None if price is None else price.cost(usage)

    return Estimate(
        calls=1,
        input_tokens=about,
        max_input_tokens=at_most,
        max_output_tokens=max_tokens,
        cost=cost(about),
        max_cost=cost(at_most),
    )


def template_parts(text: str, path: pathlib.Path) -> tuple[str, str]:
    """Returns the system message of a template, empty without one, and the user message.

    Raises:
        ValueError: the parts are not those of a template.
    """
    pieces = re.split(r"^\[(system|user)\][ \t]*$", text, flags=re.MULTILINE)
    parts = dict(zip(pieces[1::2], (piece.strip() for piece in pieces[2::2]), strict=True))
    names = pieces[1::2]
    if pieces[0].strip() or names not in (["system", "user"], ["user"]) or not parts["user"]:
        raise ValueError(
            f"template {path} should be a line [system] and its text (or none), then a"
            " line [user] and its text"
        )
    return parts["system"] if "system" in parts else "", parts["user"]


def _reference(prompt: Prompt) -> str:
    parts = []
    if _given(prompt.reference):
        parts.append(f"医生当时的回答：{prompt.reference}")
    if _given(prompt.diagnosis):
        parts.append(f"医生的诊断：{prompt.diagnosis}")
    return "\n".join(parts) if parts else _NO_REFERENCE


def _sendable(text: str) -> str:
    """Returns the text with a question mark for each lone surrogate, which UTF-8 lacks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _given(text: str | None) -> bool:
    return text is not None and bool(text.strip())


class _NoLogProbs(replies.BadReply):
    """The reply has no log-probabilities at all."""


def _check_whole(completion: Completion) -> None:
    """Raises BadReply for a reply without a text, or one that was cut off or withheld."""
    if completion.refusal is not None and completion.text is None:
        raise replies.BadReply(f"the model refuses: {completion.refusal}", "refused")
    replies.check_ending(completion.finish_reason)
    if completion.text is None:
        raise replies.BadReply("the reply has no text in it")
