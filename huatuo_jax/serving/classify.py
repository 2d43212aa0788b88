"""`/v1/classify`: raw scores of a reward model."""

import functools
from collections.abc import Sequence

from openai.types import CompletionUsage
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from huatuo_jax.data.records import Messages
from huatuo_jax.serving.answering import Answering
from huatuo_jax.serving.bodies import ChatMessage, ClassifyBody
from huatuo_jax.serving.errors import ApiError, refuse
from huatuo_jax.serving.exchange import body_of
from huatuo_jax.serving.models import Reward, dialogue_of

_SCORED_AT_ONCE = 16  # Responses, between two steps of the engines.


async def respond(http: Request, answering: Answering) -> Response:
    """Scores responses to conversations.

    Raises:
        ApiError: the request is refused.
        ClientDisconnect: the client left.
    """
    body = await body_of(http, ClassifyBody)
    reward = answering.served.reward(body.model)
    if body.messages is not None:
        dialogue = dialogue_of(body.messages)
        given = [(dialogue, one) for one in body.responses or ()]
    else:
        given = [_split(one, number) for number, one in enumerate(body.input or ())]
    # Before the first is scored, so that a fault costs nothing.
    num_tokens = await answering.aside(functools.partial(_check, reward, given))
    scores: list[float] = []
    for first in range(0, len(given), _SCORED_AT_ONCE):
        if await http.is_disconnected():
            raise ClientDisconnect
        dialogues, responses = zip(*given[first : first + _SCORED_AT_ONCE], strict=True)
        work = functools.partial(reward.model.score_batch, dialogues, responses, raw=True)
        scores += await answering.score(work)
    usage = CompletionUsage(prompt_tokens=num_tokens, completion_tokens=0, total_tokens=num_tokens)
    data = [{"index": index, "score": score} for index, score in enumerate(scores)]
    made = {"object": "list", "model": reward.name, "data": data}
    return JSONResponse({**made, "usage": usage.model_dump(exclude_unset=True)})


def _split(messages: Sequence[ChatMessage], number: int) -> tuple[Messages, str]:
    """Returns a conversation without its last message, and that message's text."""
    last = messages[-1].turn()
    if last["role"] != "assistant":
        refuse(f"input[{number}]", "should end with the assistant's response")
    if len(messages) == 1:
        refuse(f"input[{number}]", "has a response and no message of the user before it")
    try:
        return dialogue_of(messages[:-1]), last["content"]
    except ApiError as error:
        raise ApiError(400, f"input[{number}]: {error.message}", param="input") from error


def _check(reward: Reward, given: Sequence[tuple[Messages, str]]) -> int:
    """Returns the number of all tokens.

    Raises:
        ApiError: a response is too long with its conversation, or the template cannot render it.
    """
    dialogues, responses = zip(*given, strict=True)
    try:
        return reward.model.count_tokens(dialogues, responses)
    except ValueError as error:
        raise ApiError(400, str(error), code="context_length_exceeded") from error
