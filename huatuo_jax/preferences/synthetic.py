"""Preference pairs made of plain dialogues, where there is no judge and no model's answers.

The assistant's message is taken to be better than a replacement. That is true by construction and
not a judgement, so each source is named after the method that made its worse answer. A reward model
trained on these pairs shows that its stage works; it does not distinguish good medicine from bad.
"""

import hashlib
from collections.abc import Callable, Sequence

from huatuo_jax.data.mixture import dialogue_text, permutation
from huatuo_jax.data.records import Comparison, Dialogue, Messages, answer

MISMATCHED = "mismatched_reference"
"""The source of pairs with another dialogue's answer."""

WHOLE_DIALOGUE = "whole_dialogue"
"""The extra field of spoiled answers' pairs that holds the text of the whole dialogue.

As `group_field` it holds a pair out exactly where fine-tuning with the same held-out settings holds
out the dialogue, so that a backbone has not seen the data that its reward model is tested on.
"""


def mismatched_references(dialogues: Sequence[Dialogue]) -> list[Comparison]:
    """Pairs each dialogue's own last answer with that of another dialogue.

    In the order of a hash of the prompts, each is paired with the next one whose answer differs.

    Raises:
        ValueError: all answers are the same.
    """
    ordered = sorted(dialogues, key=lambda one: _digest(one.messages[:-1]))
    others = _others([one.messages[-1].content for one in ordered])
    return [
        Comparison(
            id=f"{one.id}:{MISMATCHED}",
            messages=one.messages[:-1],
            chosen=one.messages[-1:],
            rejected=answer(other),
            source=MISMATCHED,
            extra=dict(one.extra),
        )
        for one, other in zip(ordered, others, strict=True)
    ]


def spoiled_answers(dialogues: Sequence[Dialogue]) -> list[Comparison]:
    """Pairs the longest answer of each dialogue with four spoiled forms of it.

    `cut_short`, `repeated`, `shuffled` (see the functions of these names) and
    `mismatched_reference`, the longest answer of another dialogue. The prompt is everything before
    the answer. A form equal to the answer is left out.

    Raises:
        ValueError: all answers are the same.
    """
    ordered = sorted((_cut_at_longest(one) for one in dialogues), key=_digest)
    by_prompt = {_cut_at_longest(one): one for one in dialogues}
    others = _others([messages[-1].content for messages in ordered])
    comparisons = []
    for messages, other in zip(ordered, others, strict=True):
        dialogue, good = by_prompt[messages], messages[-1].content
        forms = {name: spoil(good) for name, spoil in SPOILED.items()} | {MISMATCHED: other}
        comparisons += [
            Comparison(
                id=f"{dialogue.id}:{name}",
                messages=messages[:-1],
                chosen=messages[-1:],
                rejected=answer(bad),
                source=name,
                extra={**dialogue.extra, WHOLE_DIALOGUE: dialogue_text(dialogue.messages)},
            )
            for name, bad in forms.items()
            if bad != good
        ]
    return comparisons


def cut_short(text: str) -> str:
    """Returns the first half of a text."""
    return text[: -(-len(text) // 2)]


def repeated(text: str) -> str:
    """Repeats the first quarter of a text up to the text's length."""
    part = text[: -(-len(text) // 4)]
    return (part * 4)[: len(text)]


def shuffled(text: str) -> str:
    """Shuffles the characters of a text in an order that depends on the text alone."""
    return "".join(text[index] for index in permutation(len(text), "shuffled", text).tolist())


SPOILED: dict[str, Callable[[str], str]] = {
    "cut_short": cut_short,
    "repeated": repeated,
    "shuffled": shuffled,
}


def _cut_at_longest(dialogue: Dialogue) -> Messages:
    """Returns the messages up to the first of the longest answers."""
    _, index = max(
        (len(message.content), -index)
        for index, message in enumerate(dialogue.messages)
        if message.role == "assistant" and index
    )
    return dialogue.messages[: 1 - index]


def _others(answers: Sequence[str]) -> list[str]:
    """Returns for each answer the next different one, cyclically."""
    found = []
    for index, one in enumerate(answers):
        after = (*answers[index + 1 :], *answers[:index])
        other = next((text for text in after if text != one), None)
        if other is None:
            raise ValueError("dialogues: all have the same answer; there is nothing to compare")
        found.append(other)
    return found


def _digest(messages: Messages) -> str:
    text = dialogue_text(messages)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
