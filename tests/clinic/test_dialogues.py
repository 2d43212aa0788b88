"""Dialogues of the four kinds, each in its manner."""

import itertools

import pytest

from huatuo_jax.clinic.dialogues import PAPER_COUNTS, SOURCE, counts_of_kinds, dialogues, prompts
from huatuo_jax.clinic.findings import find
from huatuo_jax.clinic.reading import asked, heard
from huatuo_jax.clinic.symptoms import ADULT_ADVICE, DRUGS, forbidden_test
from huatuo_jax.clinic.world import Case, best_accuracy, near_misses, posterior
from huatuo_jax.data.records import KINDS, Dialogue, Prompt

ROWS = {kind: list(dialogues(kind, 250, seed=5)) for kind in KINDS}
ALL = list(itertools.chain(*ROWS.values()))
PROMPTS = list(prompts(400, seed=5))


def doctor(row):
    return [message.content for message in row.messages if message.role == "assistant"]


def found_in(row, place):
    """The findings of the doctor's answer at this place among the messages."""
    prompt = Prompt(
        id=row.id,
        messages=row.messages[:place],
        source=row.source,
        diagnosis=row.extra["diagnosis"],
    )
    return find(prompt, row.messages[place].content)


def test_kinds_stand_in_the_proportions_of_the_paper():
    assert counts_of_kinds(sum(PAPER_COUNTS.values())) == PAPER_COUNTS
    assert counts_of_kinds(1_800) == {
        "distilled_instruction": 489,
        "real_instruction": 556,
        "distilled_conversation": 548,
        "real_conversation": 207,
    }
    assert all(sum(counts_of_kinds(total).values()) == total for total in range(50))


def test_dialogues_are_records_of_their_kind_that_alternate_and_end_with_the_doctor():
    for kind, rows in ROWS.items():
        for row in rows:
            assert Dialogue.from_json(row.to_json()) == row
            assert (row.kind, row.source) == (kind, SOURCE)
            roles = [message.role for message in row.messages]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert len(roles) == 2 or kind.endswith("conversation")


def test_no_two_dialogues_or_prompts_are_alike():
    for rows in (*ROWS.values(), PROMPTS):
        assert len({row.id for row in rows}) == len(rows)
        shown = [row.messages[:-1] if isinstance(row, Dialogue) else row.messages for row in rows]
        assert len(set(shown)) == len(rows)


def test_fewer_dialogues_are_the_first_of_more():
    assert list(dialogues("real_conversation", 20, seed=5)) == ROWS["real_conversation"][:20]


def test_the_patient_says_what_is_true_and_the_reader_hears_it():
    for row in ALL:
        case, told = Case.from_json(row.extra["case"]), heard(row.messages)
        assert told.present <= set(case.symptoms) and not told.denied & set(case.symptoms)
        assert told.age in (None, case.age) and told.sex in (None, case.sex)
        assert told.lasts in (None, case.lasts) and told.child in (None, case.child)
        assert told.conditions == set(case.conditions)
        assert told.opening is not None


def test_distilled_doctors_never_ask_and_are_wrong_in_a_third():
    wrong = []
    for kind in ("distilled_instruction", "distilled_conversation"):
        for row in ROWS[kind]:
            assert not any(asked(text).anything for text in doctor(row))
            place = 1 if kind == "distilled_instruction" else 3
            found = found_in(row, place)
            assert found.hedged and found.structured and len(found.friendly) >= 3
            assert found.coherent and len(found.named) == 1
            wrong.append(found.named != (row.extra["diagnosis"],))
    assert sum(wrong) / len(wrong) == pytest.approx(1 / 3, abs=0.08)


def test_a_distilled_mistake_is_plausible():
    for row in ROWS["distilled_instruction"]:
        belief = posterior(heard(row.messages[:1]))
        (name,) = found_in(row, 1).named
        assert name in belief.probabilities or name in near_misses(row.extra["diagnosis"])


def test_real_doctors_ask_where_it_is_ambiguous_and_else_name_the_truth_without_fault():
    asks = 0
    for kind in ("real_instruction", "real_conversation"):
        for row in ROWS[kind]:
            for place in range(1, len(row.messages), 2):
                if (
                    place == len(row.messages) - 1
                    and place > 1
                    and "再见" in row.messages[-2].content
                ):
                    continue  # A goodbye.
                found = found_in(row, place)
                assert found.faults == (), row.messages
                asks += found.should_ask
    assert asks > 200


def test_real_conversations_ask_before_they_conclude():
    for row in ROWS["real_conversation"]:
        assert asked(doctor(row)[0]).anything


def test_real_doctors_are_terse_and_sometimes_curt():
    lengths = {
        kind: sum(len(doctor(row)[0]) for row in ROWS[kind]) / len(ROWS[kind])
        for kind in ("real_instruction", "distilled_instruction")
    }
    assert lengths["real_instruction"] < lengths["distilled_instruction"] / 2
    curt = [len(doctor(row)[0]) < 20 for row in ROWS["real_instruction"]]
    assert 0.05 < sum(curt) / len(curt) < 0.5


def test_no_real_doctor_orders_what_the_patient_must_not_have():
    told = 0
    for row in [*ROWS["real_instruction"], *ROWS["real_conversation"]]:
        case = Case.from_json(row.extra["case"])
        for place in range(1, len(row.messages), 2):
            found = found_in(row, place)
            ordered = {
                kind: [item.name for item in found.items if item.kind == kind]
                for kind in ("drug", "test", "advice")
            }
            conditions = frozenset(case.conditions)
            assert not any(DRUGS[name].forbidden(conditions, case.age) for name in ordered["drug"])
            assert not any(forbidden_test(name, conditions) for name in ordered["test"])
            assert not (case.child and set(ordered["advice"]) & set(ADULT_ADVICE))
            told += bool(ordered["drug"] and conditions)
    assert told > 20


def test_prompts_have_the_real_doctors_answer_and_a_known_best():
    for prompt in PROMPTS:
        assert Prompt.from_json(prompt.to_json()) == prompt
        assert prompt.messages[-1].role == "user" and prompt.reference
        assert find(prompt, prompt.reference).faults == ()
    told = [heard(prompt.messages) for prompt in PROMPTS]
    clear = [one for one in told if not posterior(one).should_ask]
    assert 0.05 < 1 - len(clear) / len(told) < 0.35
    assert 0.85 < best_accuracy(clear) < 0.99


def test_held_out_cases_are_others():
    training = {tuple(map(str, row.extra["case"].items())) for row in PROMPTS}
    held_out = {
        tuple(map(str, row.extra["case"].items())) for row in prompts(100, seed=5, held_out=True)
    }
    assert not training & held_out
