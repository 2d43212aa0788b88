"""Held-out texts are made of sentences that no training text holds."""

import string

import pytest

from huatuo_jax.clinic.dialogues import counts_of_kinds, dialogues, prompts
from huatuo_jax.clinic.reading import sentences
from huatuo_jax.clinic.world import Draws
from huatuo_jax.clinic.writing import TEMPLATES, Writer, counted_sentences


def shared_sentences(training, held_out):
    """Sentences with a term of the tables on both sides."""
    return counted_sentences(training) & counted_sentences(held_out)


def texts(rows):
    found = []
    for row in rows:
        found += [message.content for message in row.messages]
        found += [row.reference] if hasattr(row, "reference") else []
    return found


def corpus(total, *, held_out):
    rows = [
        row
        for kind, count in counts_of_kinds(total).items()
        for row in dialogues(kind, count, seed=0, held_out=held_out)
    ]
    return texts(rows) + texts(prompts(total // 4, seed=0, held_out=held_out))


def test_held_out_texts_share_no_counted_sentence_with_training():
    training, held_out = corpus(1_800, held_out=False), corpus(400, held_out=True)
    assert len(counted_sentences(training)) > 5_000
    assert len(counted_sentences(held_out)) > 1_000
    assert shared_sentences(training, held_out) == set()


def test_most_sentences_are_counted():
    written = [sentence for text in corpus(200, held_out=True) for sentence in sentences(text)]
    stock = [sentence for sentence in written if not counted_sentences([sentence])]
    assert len(stock) < 0.4 * len(written)
    assert len(set(stock)) < 120  # Greetings, goodbyes, durations, ages.


def test_a_shared_sentence_is_found_whatever_its_number_and_mark():
    assert shared_sentences(["您好。\n1. 考虑胃溃疡。"], ["2. 考虑胃溃疡！您好。"]) == {
        "考虑胃溃疡"
    }
    assert shared_sentences(["您好。马上去急诊。"], ["您好。马上去急诊。"]) == set()


@pytest.mark.parametrize("what", sorted(TEMPLATES))
def test_a_template_is_one_sentence_and_none_stands_twice(what):
    templates = TEMPLATES[what]
    assert len(set(templates)) == len(templates)
    for template in templates:
        places = [
            place for _, place, _, _ in string.Formatter().parse(template) if place is not None
        ]
        filled = template.format(*("甲乙丙丁戊己"[: len(places)]))
        if places:
            assert len(list(sentences(filled))) == 1, template


def test_the_kept_template_is_never_used_in_training_and_always_in_held_out_texts():
    held_out = {Writer(Draws(n), held_out=True).say("conclude", "肺炎") for n in range(50)}
    training = {Writer(Draws(n), held_out=False).say("conclude", "肺炎") for n in range(300)}
    assert len(held_out) == 1 and len(training) == len(TEMPLATES["conclude"]) - 1
    assert not held_out & training
