"""Responses as they are given out, and as they are scored again."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from huatuo_jax.comparisons.data import AnswersTokenizer, AnswersToPrompt
from huatuo_jax.data.accounting import TOO_LONG
from huatuo_jax.data.answers import Sampled, SampledPrompt
from huatuo_jax.data.python_data import DialogueLike, as_answer, as_prompt
from huatuo_jax.generation.requests import FinishReason
from huatuo_jax.generation.saved_model import SavedModel
from huatuo_jax.scoring import GivenAnswer


@dataclasses.dataclass(frozen=True)
class Response:
    """A response of a model; `str` gives its text.

    Attributes:
        text: without what the template writes around it.
        token_ids: as sampled, the token that ended it included.
        log_probs: of each token, at the sampling temperature, nothing filtered or penalised.
        finish_reason: `stop` for a stop token or string, `length` for a limit.
        prompt_token_ids: what it follows.
        messages_dropped: of the dialogue's oldest, which were left out so that it fits.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    messages_dropped: int = 0

    def __str__(self) -> str:
        """The text."""
        return self.text


class LogProbs(NamedTuple):
    """What a model says of a given response.

    Attributes:
        token_ids: of the response, `[T]`, the end of its turn included.
        log_probs: of each of them given those before it, `[T]` in float32.
    """

    token_ids: tuple[int, ...]
    log_probs: npt.NDArray[np.float32]


def given_answers(
    dialogues: Sequence[DialogueLike],
    responses: Sequence[str | Response],
    model: SavedModel,
    *,
    max_length: int,
    drop_oldest_turns: bool,
) -> list[GivenAnswer]:
    """The tokens of responses behind their dialogues, by the rule of `huatuo_jax.data.answers`.

    Args:
        dialogues: one a response.
        responses: texts, which are complete; or those that a model gave, whose sampled tokens are
            used where they are of this model's tokenizer and template.
        model: whose tokens they become.
        max_length: tokens of a dialogue and a response at most.
        drop_oldest_turns: leave out the oldest question with its answer until both fit.

    Raises:
        ValueError: there are more of the one than of the other, or one of them cannot be scored.
    """
    for name, given in (("dialogues", dialogues), ("responses", responses)):
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ValueError(f"{name} is a {type(given).__name__}; it should be a list of them")
    if len(dialogues) != len(responses):
        raise ValueError(
            f"{len(responses)} responses for {len(dialogues)} dialogues; each needs its own"
        )
    return [
        _given(
            dialogue,
            response,
            model,
            place=f"[{index}]" if len(dialogues) > 1 else "",
            max_length=max_length,
            drop_oldest_turns=drop_oldest_turns,
        )
        for index, (dialogue, response) in enumerate(zip(dialogues, responses, strict=True))
    ]


def _given(
    dialogue: DialogueLike,
    response: str | Response,
    model: SavedModel,
    *,
    place: str,
    max_length: int,
    drop_oldest_turns: bool,
) -> GivenAnswer:
    messages = as_prompt(dialogue, name=f"dialogue{place}").messages
    name, behind = f"response{place}", None
    if isinstance(response, Response):
        sampled = Sampled(response.token_ids, response.finish_reason)
        answer = as_answer(response.text, sampled, name=name)
        behind = SampledPrompt(response.prompt_token_ids, response.messages_dropped)
    else:
        answer = as_answer(response, name=name)
    tokenize = AnswersTokenizer(
        template=model.template,
        tokenizer=model.tokenizer,
        max_tokens=max_length,
        policy="drop_oldest_turns" if drop_oldest_turns else "drop_row",
    )
    (found,) = tokenize(AnswersToPrompt(messages, (answer,), behind))
    if found == TOO_LONG:
        advice = "" if drop_oldest_turns else "; drop_oldest_turns leaves out the oldest turns"
        raise ValueError(
            f"{name}: more than {max_length} tokens with its dialogue{advice or '; shorten it'}"
        )
    if isinstance(found, str):
        try:  # Once more, for the reason.
            model.template.render((*messages, *answer.messages), model.tokenizer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        raise ValueError(f"{name}: it was cut off before its first token")
    return GivenAnswer(found.token_ids, int(np.argmax(found.is_answer)))
