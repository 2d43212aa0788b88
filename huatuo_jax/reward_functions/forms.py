"""The forms that a response with reasoning comes in, and the final answer of each.

A verifier reads the final answer alone: what the model thought, and thought better of, is not
graded, and a text in the thinking cannot speak to the grader.
"""

import re

THINKING = "## Thinking"
FINAL_RESPONSE = "## Final Response\n\n"
THINK_ENDS = "</think>"

_THOUGHTS = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def medical_o1_answer(response: str) -> str | None:
    r"""Returns what follows `## Final Response\n\n`; None where the form is wrong.

    Right is a response that holds this marker exactly once, blank line included, and `## Thinking`
    exactly once (HuatuoGPT-o1, arXiv 2412.18925, the reward in its PPO code), and in this order:
    behind the final response, the code that was released takes the thinking for an answer.
    """
    if response.count(FINAL_RESPONSE) != 1 or response.count(THINKING) != 1:
        return None
    before, _, answer = response.partition(FINAL_RESPONSE)
    return answer if THINKING in before else None


def think_answer(response: str) -> str | None:
    """Returns the last `<answer>...</answer>` behind the thinking; None where the form is wrong.

    Right is a response that begins with the thinking, closes it once and has an answer behind it.
    `<think>` itself may be missing, as some templates end the prompt with it.
    """
    after = _after_thoughts(response)
    return None if after is None else last_answer_tag(after)


def has_thoughts(response: str) -> bool:
    """Tells whether a response begins with thinking that it closes once, see `think_answer`."""
    return _after_thoughts(response) is not None


def last_answer_tag(text: str) -> str | None:
    """Returns the text of the last `<answer>...</answer>`; None where there is none."""
    found: list[str] = _ANSWER.findall(text)
    return found[-1] if found else None


def final_part(response: str) -> str:
    """Returns a response without its thinking, whatever form it has; all of it without one.

    Thinking that was opened and never closed leaves nothing.
    """
    if FINAL_RESPONSE in response:
        return response.rpartition(FINAL_RESPONSE)[2]
    if THINK_ENDS in response:
        return response.rpartition(THINK_ENDS)[2]
    return "" if response.lstrip().startswith(("<think>", THINKING)) else response


def _after_thoughts(response: str) -> str | None:
    """Returns what follows the thinking; None where it is not there once, at the beginning."""
    thoughts = _THOUGHTS.fullmatch(response)
    if thoughts is None or "<think>" in thoughts[1]:
        return None
    after = thoughts[2]
    return None if "<think>" in after or THINK_ENDS in after else after
