"""`/v1/chat/completions`: answers to conversations in the model's template."""

import functools
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pydantic
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
)
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from huatuo_jax.generation.requests import Answer, FinishReason, Running
from huatuo_jax.generation.streaming import GrowingAnswer
from huatuo_jax.serving.answering import Answering, Head, require_finite, usage_of
from huatuo_jax.serving.bodies import ChatBody
from huatuo_jax.serving.calls import Call, Update
from huatuo_jax.serving.exchange import EventStream, attended, body_of, json_response
from huatuo_jax.serving.models import Policy
from huatuo_jax.serving.tokens import Tokens, finite


async def respond(http: HttpRequest, answering: Answering) -> Response:
    """Answers a request.

    Raises:
        ApiError: it is refused.
        ClientDisconnect: the client left.
    """
    body = await body_of(http, ChatBody)
    policy = answering.served.policy(body.model)
    prompt = await answering.aside(functools.partial(policy.chat_prompt, body.messages))
    num_top = body.top_logprobs or 0
    requests = policy.requests([prompt], body, param="messages", num_top=num_top)
    head = Head.of(policy, "chatcmpl")
    if body.stream:
        call, finish = answering.begin(policy, requests)
        return EventStream(_chunks(http, call, body, policy, head), finish)
    async with answering.answering(http, policy, requests) as call:
        (answers,) = await call.answers()
    for answer in answers:
        require_finite(answer)
    made = ChatCompletion(
        **head._asdict(),
        object="chat.completion",
        choices=[_choice(answer, body, policy) for answer in answers],
        usage=usage_of([prompt], sum(len(answer.token_ids) for answer in answers)),
    )
    return json_response(made)


def _choice(answer: Answer, body: ChatBody, policy: Policy) -> Choice:
    logprobs = None
    if body.logprobs:
        logprobs = ChoiceLogprobs(content=_log_probs(answer, 0, policy.tokens), refusal=None)
    message = ChatCompletionMessage(
        role="assistant", content=_content(answer, policy), refusal=None
    )
    return Choice(
        index=answer.answer_index,
        message=message,
        logprobs=logprobs,
        finish_reason=answer.finish_reason,
    )


def _content(answer: Answer, policy: Policy) -> str:
    ended = answer.finish_reason == "stop"
    saved = policy.saved
    return saved.template.content_of(answer.text or "", saved.tokenizer, ended=ended)


def _log_probs(
    answer: Answer | Running, first: int, tokens: Tokens, end: int | None = None
) -> list[ChatCompletionTokenLogprob]:
    """Returns the log-probabilities of an answer's tokens from the first given on."""
    found = []
    for place in range(first, len(answer.token_ids) if end is None else end):
        token = tokens.of(answer.token_ids[place])
        best = []
        for token_id, log_prob in answer.top_log_probs[place]:
            one = tokens.of(token_id)
            best.append(TopLogprob(token=one.text, logprob=finite(log_prob), bytes=[*one.bytes]))
        found.append(
            ChatCompletionTokenLogprob(
                token=token.text,
                bytes=[*token.bytes],
                logprob=finite(answer.log_probs[place]),
                top_logprobs=best,
            )
        )
    return found


async def _chunks(
    http: HttpRequest, call: Call, body: ChatBody, policy: Policy, head: Head
) -> AsyncGenerator[pydantic.BaseModel | None, None]:
    """Yields the parts of a response as the answers are written, None where none comes."""
    stream = _Stream(body, policy, head)
    async with attended(http, call):
        for index in range(body.n):
            yield stream.chunk(index, ChoiceDelta(role="assistant", content="", refusal=None))
        async for updates in call.updates():
            if not updates:
                yield None
            for update in updates:
                for chunk in stream.take(update):
                    yield chunk
    if body.includes_usage:
        yield stream.usage(call)


class _Stream:
    """The answers of a streamed response."""

    def __init__(self, body: ChatBody, policy: Policy, head: Head) -> None:
        self._body, self._policy, self._head = body, policy, head
        self._texts = [
            GrowingAnswer(policy.saved.template, policy.saved.tokenizer, body.stops)
            for _ in range(body.n)
        ]
        self._told = [0] * body.n  # Tokens whose log-probabilities were given.
        self._num_generated = 0

    def take(self, update: Update) -> list[ChatCompletionChunk]:
        """Returns the chunks of what is new."""
        index, state = update.answer, update.state
        text = self._texts[index]
        if not isinstance(state, Answer):
            piece = text.grow(state.running.token_ids[: state.num_tokens])
            if not piece:
                return []
            return [self._piece(index, piece, state.running, state.num_tokens)]
        require_finite(state)
        self._num_generated += len(state.token_ids)
        piece, chunks = text.finish(_content(state, self._policy)), []
        if piece or (self._body.logprobs and self._told[index] < len(state.token_ids)):
            chunks.append(self._piece(index, piece, state, len(state.token_ids)))
        return [*chunks, self.chunk(index, ChoiceDelta(), finish_reason=state.finish_reason)]

    def chunk(
        self,
        index: int,
        delta: ChoiceDelta,
        *,
        logprobs: ChunkLogprobs | None = None,
        finish_reason: FinishReason | None = None,
    ) -> ChatCompletionChunk:
        """Returns a chunk of one answer."""
        choice = ChunkChoice(
            index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason
        )
        return self._made([choice], usage=None)

    def usage(self, call: Call) -> ChatCompletionChunk:
        """Returns the last chunk, with the tokens of all answers."""
        return self._made(
            [], usage=usage_of([one.prompt_token_ids for one in call.requests], self._num_generated)
        )

    def _piece(
        self, index: int, piece: str, answer: Answer | Running, num_tokens: int
    ) -> ChatCompletionChunk:
        logprobs = None
        if self._body.logprobs:
            told = _log_probs(answer, self._told[index], self._policy.tokens, num_tokens)
            logprobs = ChunkLogprobs(content=told, refusal=None)
            self._told[index] = num_tokens
        return self.chunk(index, ChoiceDelta(content=piece), logprobs=logprobs)

    def _made(self, choices: Sequence[ChunkChoice], *, usage: Any) -> ChatCompletionChunk:
        more = {"usage": usage} if self._body.includes_usage else {}
        return ChatCompletionChunk(
            **self._head._asdict(),
            object="chat.completion.chunk",
            choices=list(choices),
            **more,
        )
