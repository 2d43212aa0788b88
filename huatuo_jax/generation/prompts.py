"""Turns prompts into requests, and answers into records of the answers file."""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import transformers

from huatuo_jax.data.accounting import NOT_RENDERED, TOO_LONG, Account
from huatuo_jax.data.answers import without_oldest
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.data.records import Prompt
from huatuo_jax.generation.requests import Answer, Request, SamplingConfig

_DIGITS = 6  # Of log-probabilities in the file.


class PromptTooLong(ValueError):
    """A prompt that leaves no room for an answer."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A tokenised prompt.

    Attributes:
        prompt: as read.
        token_ids: the tokens before the answer.
        messages_dropped: number of oldest messages left out because they did not fit.
    """

    prompt: Prompt
    token_ids: list[int]
    messages_dropped: int


def make_task(
    prompt: Prompt,
    template: ChatTemplate,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_new_tokens: int,
    drop_oldest_turns: bool,
    least_new_tokens: int = 1,
) -> Task:
    """Tokenises a prompt, without its oldest exchanges where they do not fit.

    Args:
        prompt: the prompt.
        template: renders it.
        tokenizer: the model's.
        max_length: tokens of prompt and answer.
        max_new_tokens: tokens of the answer among them.
        drop_oldest_turns: leave out the oldest question with its answer until both fit; the system
            text and the last question stay.
        least_new_tokens: tokens of the answer for which there must be room.

    Raises:
        PromptTooLong: the prompt leaves no room for an answer.
        ValueError: the template cannot render it.
    """
    messages = prompt.messages
    num_system = int(messages[0].role == "system")
    token_ids = template.prompt(messages, tokenizer)
    dropped = 0
    while (
        drop_oldest_turns
        and len(token_ids) + max_new_tokens > max_length
        and len(messages) > num_system + 1
    ):
        messages = without_oldest(messages, 2)
        dropped += 2
        token_ids = template.prompt(messages, tokenizer)
    if len(token_ids) + least_new_tokens > max_length:
        advice = ""
        if not drop_oldest_turns and len(messages) > num_system + 1:
            advice = "; drop_oldest_turns leaves out its oldest turns"
        raise PromptTooLong(
            f"{len(token_ids)} tokens, at most {max_length - least_new_tokens} leave room for the "
            f"answer{advice}"
        )
    return Task(prompt, token_ids, dropped)


def make_tasks(
    prompts: Iterable[tuple[str, Prompt]],
    template: ChatTemplate,
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_new_tokens: int,
    drop_oldest_turns: bool,
    least_new_tokens: int,
    account: Account,
    purpose: str,
) -> list[Task]:
    """Tokenises all prompts that fit; the others are left out and counted.

    Args:
        prompts: each with its place, see `accounting.placed`.
        template: renders the prompts.
        tokenizer: the model's.
        max_length: tokens of prompt and answer.
        max_new_tokens: tokens of the answer among them.
        drop_oldest_turns: shorten dialogues that do not fit.
        least_new_tokens: tokens of the answer for which there must be room.
        account: counts the prompts by their use.
        purpose: the account's name for prompts that fit.
    """
    tasks = []
    for place, prompt in prompts:
        try:
            task = make_task(
                prompt,
                template,
                tokenizer,
                max_length=max_length,
                max_new_tokens=max_new_tokens,
                drop_oldest_turns=drop_oldest_turns,
                least_new_tokens=least_new_tokens,
            )
        except PromptTooLong as error:
            account.leave_out(TOO_LONG, place, str(error))
        except ValueError as error:
            account.leave_out(NOT_RENDERED, place, str(error))
        else:
            account.use(purpose)
            tasks.append(task)
    return tasks


def make_request(task: Task, sampling: SamplingConfig, *, seed: int, num_samples: int) -> Request:
    """Makes the request for a prompt's answers, which its seed and the prompt's id decide."""
    # From the id and not the position, so that a prompt has the same answers in any file.
    digest = hashlib.sha256(f"{seed} {task.prompt.id}".encode()).digest()
    return Request(
        prompt_token_ids=task.token_ids,
        sampling=sampling,
        seed=int.from_bytes(digest[:4], "big"),
        num_answers=num_samples,
    )


def make_record(
    task: Task,
    answers: Sequence[Answer],
    template: ChatTemplate,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Makes the record of a prompt and its answers.

    Args:
        task: the prompt.
        answers: in their order.
        template: the prompt's; its additions around an answer are left out of the text.
        tokenizer: the model's.

    Raises:
        ValueError: log-probabilities that are not finite.
    """
    dropped = {"messages_dropped": task.messages_dropped} if task.messages_dropped else {}
    return {
        **task.prompt.to_json(),
        **dropped,
        "prompt_token_ids": task.token_ids,
        "answers": [
            _answer_fields(
                task,
                answer,
                template.content_of(
                    answer.text or "", tokenizer, ended=answer.finish_reason == "stop"
                ),
            )
            for answer in answers
        ],
    }


def _answer_fields(task: Task, answer: Answer, text: str) -> dict[str, Any]:
    if not all(map(math.isfinite, answer.log_probs)):
        raise ValueError(
            f"prompt {task.prompt.id!r}: the model's log-probabilities are not finite; its weights "
            "are broken, or its dtype too narrow"
        )
    return {
        "text": text,
        "token_ids": answer.token_ids,
        "log_probs": [round(value, _DIGITS) for value in answer.log_probs],
        "finish_reason": answer.finish_reason,
    }
