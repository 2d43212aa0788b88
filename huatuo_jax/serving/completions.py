"""`/v1/completions`: continuations of texts and token ids, and the log-probabilities of prompts."""

import codecs
import functools
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, NamedTuple

import pydantic
from openai.types import Completion, CompletionChoice
from openai.types.completion_choice import Logprobs
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from huatuo_jax.generation.requests import Answer, FinishReason, Request, Running
from huatuo_jax.generation.streaming import GrowingAnswer, GrowingText
from huatuo_jax.serving.answering import Answering, Head, require_finite, usage_of
from huatuo_jax.serving.bodies import CompletionBody
from huatuo_jax.serving.calls import Call, Growing
from huatuo_jax.serving.exchange import EventStream, attended, body_of, json_response
from huatuo_jax.serving.models import Policy
from huatuo_jax.serving.tokens import finite, plain_text

_SCORED_AT_ONCE = 16  # Prompts, between two steps of the engines.


class _Prompt(NamedTuple):
    """A prompt.

    Attributes:
        token_ids: of it.
        text: of it, for an echo.
        log_probs: of its tokens; None for the first. None where they are not asked for.
        best: for each token the best ones in its place by their log-probabilities.
    """

    token_ids: list[int]
    text: str
    log_probs: list[float | None] | None = None
    best: Sequence[Mapping[int, float] | None] = ()


async def respond(http: HttpRequest, answering: Answering) -> Response:
    """Continues prompts.

    Raises:
        ApiError: the request is refused.
        ClientDisconnect: the client left.
    """
    body = await body_of(http, CompletionBody)
    policy = answering.served.policy(body.model)
    prompts = await answering.aside(functools.partial(_tokenized, policy, body))
    token_ids = [one.token_ids for one in prompts]
    requests: list[Request] = []
    if body.max_tokens == 0:
        policy.check_lengths(token_ids, param="prompt", room=0)
    else:
        requests = policy.requests(token_ids, body, param="prompt", num_top=body.logprobs or 0)
    if body.echo and body.logprobs is not None:
        prompts = await _scored(http, answering, policy, prompts, body.logprobs)
    head = Head.of(policy, "cmpl")
    if body.stream:
        call, finish = answering.begin(policy, requests)
        return EventStream(_chunks(http, call, body, policy, prompts, head), finish)
    answers: list[list[Answer]] = [[] for _ in prompts]
    if requests:
        async with answering.answering(http, policy, requests) as call:
            answers = await call.answers()
    choices = [
        _choice(number * body.n + index, prompt, answer, body, policy)
        for number, (prompt, group) in enumerate(zip(prompts, answers, strict=True))
        for index, answer in enumerate(group or [None] * body.n)
    ]
    num_generated = sum(len(answer.token_ids) for group in answers for answer in group)
    made = Completion(
        **head._asdict(),
        object="text_completion",
        choices=choices,
        usage=usage_of(token_ids, num_generated),
    )
    return json_response(made)


def _tokenized(policy: Policy, body: CompletionBody) -> list[_Prompt]:
    """Returns the prompts of a body."""
    found = []
    for one in body.prompts:
        if isinstance(one, str):
            ids = policy.text_prompt(one, add_special_tokens=body.add_special_tokens)
            found.append(_Prompt(ids, one))
        else:
            text = plain_text(policy.saved.tokenizer, one) if body.echo else ""
            found.append(_Prompt(one, text))
    return found


async def _scored(
    http: HttpRequest,
    answering: Answering,
    policy: Policy,
    prompts: Sequence[_Prompt],
    num_top: int,
) -> list[_Prompt]:
    """Returns prompts with the log-probabilities of their tokens, at temperature 1."""
    found = []
    for first in range(0, len(prompts), _SCORED_AT_ONCE):
        if await http.is_disconnected():
            raise ClientDisconnect
        part = prompts[first : first + _SCORED_AT_ONCE]
        work = functools.partial(policy.score, [one.token_ids for one in part], num_top)
        for prompt, scored in zip(part, await answering.score(work), strict=True):
            log_probs = [None, *scored.log_probs]
            found.append(prompt._replace(log_probs=log_probs, best=[None, *scored.best]))
    return found


def _choice(
    index: int, prompt: _Prompt, answer: Answer | None, body: CompletionBody, policy: Policy
) -> CompletionChoice:
    """Returns a choice; an answer of None has no tokens."""
    text = ""
    reason: FinishReason = "length"
    if answer is not None:
        require_finite(answer)
        text, reason = answer.text or "", answer.finish_reason
    told = None
    if body.logprobs is not None:
        log_probs = _LogProbs(prompt if body.echo else None, policy)
        told = log_probs.prompt_part
        if answer is not None:
            log_probs.extend(told, answer, len(answer.token_ids))
    return CompletionChoice(
        index=index,
        text=prompt.text + text if body.echo else text,
        logprobs=told,
        finish_reason=reason,
    )


def _empty() -> Logprobs:
    # Not validated: the first token of a prompt has None, which the type does not foresee.
    return Logprobs.model_construct(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])


class _LogProbs:
    """The log-probabilities of a choice's tokens, in parts.

    A token's offset is the number of characters of the text before it.

    Attributes:
        prompt_part: the first part: the prompt's, if it is echoed.
    """

    def __init__(self, prompt: _Prompt | None, policy: Policy) -> None:
        """Starts with the prompt's.

        Args:
            prompt: that is echoed; None for none.
            policy: the model.
        """
        self._policy, self.prompt_part = policy, _empty()
        self._growing = GrowingText(policy.saved.tokenizer)
        self._num_told = self._start = self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if prompt is not None:
            assert prompt.log_probs is not None
            rows = zip(prompt.token_ids, prompt.log_probs, prompt.best, strict=True)
            for row in rows:
                self._add(self.prompt_part, *row, text=prompt.text)
            self._start, self._offset = len(prompt.text), 0
            self._decoder.reset()

    def extend(self, part: Logprobs, answer: Answer | Running, num_tokens: int) -> Logprobs:
        """Adds those of an answer's tokens up to a number that were not told yet."""
        token_ids = answer.token_ids[:num_tokens]
        text = self._growing.of(token_ids)
        for place in range(self._num_told, num_tokens):
            log_prob = finite(answer.log_probs[place])
            best = {one: finite(value) for one, value in answer.top_log_probs[place]}
            self._add(part, token_ids[place], log_prob, best, text=text)
        self._num_told = num_tokens
        self._growing.settled(token_ids)
        return part

    def _add(
        self,
        part: Logprobs,
        token_id: int,
        log_prob: float | None,
        best: Mapping[int, float] | None,
        *,
        text: str,
    ) -> None:
        """Adds a token; its characters are those that the text has in its place, if any."""
        tokens = self._policy.tokens
        named: dict[str, float] | None = None
        if best is not None and log_prob is not None:
            every = {**best, token_id: log_prob}  # The token's own value is also among the best.
            named = {name: every[one] for one, name in tokens.named(every).items()}
        lists: tuple[Any, ...] = (
            part.tokens,
            part.token_logprobs,
            part.top_logprobs,
            part.text_offset,
        )
        values = (tokens.of(token_id).text, log_prob, named, self._start + self._offset)
        for one, value in zip(lists, values, strict=True):
            one.append(value)
        characters = self._decoder.decode(tokens.of(token_id).bytes)
        for own in (characters, characters.removeprefix(" ")):
            if text.startswith(own, self._offset):
                self._offset += len(own)
                break


async def _chunks(
    http: HttpRequest,
    call: Call,
    body: CompletionBody,
    policy: Policy,
    prompts: Sequence[_Prompt],
    head: Head,
) -> AsyncGenerator[pydantic.BaseModel | None, None]:
    """Yields the parts of a response as the answers are written, None where none comes."""
    streams = [
        _Stream(number * body.n + index, prompt, body, policy)
        for number, prompt in enumerate(prompts)
        for index in range(body.n)
    ]
    more = {"usage": None} if body.includes_usage else {}

    def made(choices: list[CompletionChoice], **fields: Any) -> Completion:
        # Not validated: an unfinished choice has no reason, which the type does not foresee.
        return Completion.model_construct(
            **head._asdict(), object="text_completion", choices=choices, **(more | fields)
        )

    num_generated = 0
    async with attended(http, call):
        if body.echo:
            for stream in streams:
                yield made([stream.prompt()])
        async for updates in call.updates():
            if not updates:
                yield None
            for prompt, answer, state in updates:
                if isinstance(state, Answer):
                    num_generated += len(state.token_ids)
                choice = streams[prompt * body.n + answer].take(state)
                if choice is not None:
                    yield made([choice])
    if body.includes_usage:
        yield made([], usage=usage_of([one.token_ids for one in prompts], num_generated))


class _Stream:
    """A choice of a streamed response."""

    def __init__(self, index: int, prompt: _Prompt, body: CompletionBody, policy: Policy) -> None:
        self._index, self._prompt = index, prompt
        self._text = GrowingAnswer(None, policy.saved.tokenizer, body.stops)
        self._log_probs: _LogProbs | None = None
        if body.logprobs is not None:
            self._log_probs = _LogProbs(prompt if body.echo else None, policy)

    def prompt(self) -> CompletionChoice:
        """Returns the choice with the prompt."""
        part = None if self._log_probs is None else self._log_probs.prompt_part
        return self._made(self._prompt.text, part, None)

    def take(self, state: Growing | Answer) -> CompletionChoice | None:
        """Returns the choice with what is new; None where nothing can be told yet."""
        if isinstance(state, Answer):
            require_finite(state)
            piece = self._text.finish(state.text or "")
            return self._made(piece, self._part(state, len(state.token_ids)), state.finish_reason)
        piece = self._text.grow(state.running.token_ids[: state.num_tokens])
        if not piece:
            return None
        return self._made(piece, self._part(state.running, state.num_tokens), None)

    def _part(self, answer: Answer | Running, num_tokens: int) -> Logprobs | None:
        if self._log_probs is None:
            return None
        return self._log_probs.extend(_empty(), answer, num_tokens)

    def _made(
        self, text: str, part: Logprobs | None, reason: FinishReason | None
    ) -> CompletionChoice:
        return CompletionChoice.model_construct(
            index=self._index, text=text, logprobs=part, finish_reason=reason
        )
