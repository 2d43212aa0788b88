"""Penalties of length, as reward functions: 0 for a short response and negative for a long one.

They say nothing of what a response is worth, so that a reward takes them as `adjusts` terms.
"""

from collections.abc import Sequence
from typing import Any


def over_free_tokens(
    prompts: Sequence[Any],
    responses: Sequence[str],
    *,
    num_final_tokens: Sequence[int],
    factor: float = 0.5,
    free_tokens: int = 200,
    span: int = 4000,
    **columns: Any,
) -> list[float]:
    """Computes -factor * min(max(tokens - free_tokens, 0), span) / span (OnePO, HuatuoGPT-3).

    Args:
        prompts: not read.
        responses: not read.
        num_final_tokens: tokens of each response's final answer, its thinking left out.
        factor: the largest penalty.
        free_tokens: up to which there is none.
        span: so many tokens further it is the largest.
        **columns: not read.

    Raises:
        ValueError: a setting out of its range.
    """
    for name, value in (("factor", factor), ("free_tokens", free_tokens)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}={value!r} must be 0 or more")
    if not span >= 1:
        raise ValueError(f"span={span!r} must be at least 1")
    return [-factor * min(max(n - free_tokens, 0), span) / span for n in num_final_tokens]


def overlong(
    prompts: Sequence[Any],
    responses: Sequence[str],
    *,
    num_tokens: Sequence[int],
    max_tokens: int = 20_480,
    buffer: int = 4_096,
    **columns: Any,
) -> list[float]:
    """Computes DAPO's soft penalty of overlong responses (arXiv 2503.14476, equation 13).

    0 up to max_tokens - buffer, from there down to -1 at max_tokens in a line, and -1 beyond.

    Args:
        prompts: not read.
        responses: not read.
        num_tokens: tokens of each response, its thinking and its end among them.
        max_tokens: beyond which the penalty is -1.
        buffer: tokens before that over which it grows.
        **columns: not read.

    Raises:
        ValueError: a setting out of its range.
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"buffer={buffer!r} must be at least 1 and at most {max_tokens=}")
    free = max_tokens - buffer
    return [-min(max(n - free, 0), buffer) / buffer for n in num_tokens]
