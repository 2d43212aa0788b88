"""Comparisons made of plain dialogues, where no judge and no answers of a model are at hand.

What the doctor said is taken to be better than something put in its place. That is true by
construction and nobody's judgement, so each source is named for how its worse answer was made. A
reward model of these tells that its stage works; it does not tell good medicine from bad.
"""

import hashlib
from collections.abc import Callable, Sequence

from huatuo_jax.data.mixture import dialogue_text, permutation
from huatuo_jax.data.records import Comparison, Dialogue, Messages, answer

MISMATCHED = "mismatched_reference"
"""The source of comparisons with another dialogue's answer."""

WHOLE_DIALOGUE = "whole_dialogue"
"""The extra field of spoiled answers' comparisons that holds the text of the whole dialogue.

As `group_field` it holds a comparison out exactly where fine-tuning with the same held-out settings
holds out the dialogue, so that a backbone has not seen what its reward model is tested on.
"""


def mismatched_references(dialogues: Sequence[Dialogue]) -> list[Comparison]:
    """Each dialogue's own last answer against that of another dialogue, told from their content.

    In the order of a hash of the prompts, each is paired with the next whose answer differs.

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
    """The doctor's longest answer of each dialogue against four spoiled forms of it.

    `cut_short`, `repeated`, `shuffled` (see the functions of these names) and
    `mismatched_reference`, the longest answer of another dialogue. The prompt is what was said
    before. A form that would be the answer itself is left out.

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
    """The first half of a text."""
    return text[: -(-len(text) // 2)]


def repeated(text: str) -> str:
    """The first quarter of a text over and over, as long as the text."""
    part = text[: -(-len(text) // 4)]
    return (part * 4)[: len(text)]


def shuffled(text: str) -> str:
    """The characters of a text in an order that the text alone decides."""
    return "".join(text[index] for index in permutation(len(text), "shuffled", text).tolist())


SPOILED: dict[str, Callable[[str], str]] = {
    "cut_short": cut_short,
    "repeated": repeated,
    "shuffled": shuffled,
}


def _cut_at_longest(dialogue: Dialogue) -> Messages:
    """The messages up to the longest answer, the first of those."""
    _, index = max(
        (len(message.content), -index)
        for index, message in enumerate(dialogue.messages)
        if message.role == "assistant" and index
    )
    return dialogue.messages[: 1 - index]


def _others(answers: Sequence[str]) -> list[str]:
    """For each answer the next one, around the end, that is not the same."""
    found = []
    for index, one in enumerate(answers):
        after = (*answers[index + 1 :], *answers[:index])
        other = next((text for text in after if text != one), None)
        if other is None:
            raise ValueError("dialogues: all of them have the same answer; nothing to compare")
        found.append(other)
    return found


def _digest(messages: Messages) -> str:
    text = dialogue_text(messages)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
