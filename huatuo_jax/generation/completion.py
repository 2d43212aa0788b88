"""Whether an answer is complete, and the answer that comes of it."""

import transformers

from huatuo_jax.data.answers import text_of
from huatuo_jax.generation.requests import Answer, FinishReason, Usage
from huatuo_jax.generation.slots import Running
from huatuo_jax.generation.texts import find_stop


def finished(
    running: Running, *, active: bool, tokenizer: transformers.PreTrainedTokenizerBase | None
) -> Answer | None:
    """The answer if it is complete: by a stop string, a stop token, or its length.

    Args:
        running: what was decoded of it; how far it was searched for stop strings is noted there.
        active: whether the device would go on with it.
        tokenizer: the model's; without one the answer has no text.
    """
    sampling, ids = running.request.sampling, running.token_ids
    if sampling.stop_strings:
        assert tokenizer is not None
        first = max(running.num_checked + 1, sampling.min_new_tokens, 1)
        cut = find_stop(tokenizer, ids, sampling.stop_strings, first=first)
        if cut is not None:
            return _answer(running, num_tokens=cut.num_tokens, text=cut.text, reason="stop")
        running.num_checked = len(ids)
    if active:
        return None
    stopped = ids[-1] in sampling.stop_token_ids
    text = None
    if tokenizer is not None:
        text = text_of(tokenizer, ids[:-1] if stopped else ids)
    reason: FinishReason = "stop" if stopped else "length"
    return _answer(running, num_tokens=len(ids), text=text, reason=reason)


def _answer(running: Running, *, num_tokens: int, text: str | None, reason: FinishReason) -> Answer:
    prompt_tokens = len(running.request.prompt_token_ids)
    return Answer(
        request_index=running.request_index,
        answer_index=running.answer_index,
        token_ids=running.token_ids[:num_tokens],
        text=text,
        log_probs=running.log_probs[:num_tokens],
        sampling_log_probs=running.sampling_log_probs[:num_tokens],
        finish_reason=reason,
        usage=Usage(prompt_tokens, num_tokens),
    )
