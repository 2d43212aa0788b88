import dataclasses
import itertools
import json
import math
import random
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.data.readers import read_comparisons
from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.dpo import dpo_loss
from huatuo_jax.judge import questions
from huatuo_jax.judge.judgements import CRITERIA, Judgement, prompt_hash, sha256
from huatuo_jax.judge.questions import Answered, Verdicts, log_odds, probability
from huatuo_jax.preferences import from_judgements as balancing
from huatuo_jax.preferences import from_judgements as made
from huatuo_jax.preferences.from_judgements import (
    ComparisonConfig,
    MixedFile,
    make_comparisons,
    write_comparisons,
)
from huatuo_jax.reward.stage import pair_losses


def answered(prompt_id, *texts, turns=1, source="clinic", **extra):
    talk = [Message("user", f"{prompt_id} 头痛"), Message("assistant", "几天了？")] * turns
    prompt = Prompt(prompt_id, tuple(talk[:-1]), source, extra=extra)
    return Answered(prompt, texts)


def judgement(item, protocol, shown, *, judge="judge", key="", error=None, **verdict):
    fields = (
        {"answer": shown[0]}
        if protocol == "score"
        else dict(zip(("first", "second"), shown, strict=True))
    )
    texts = [item.answers[index] for index in shown]
    return Judgement(
        id=item.prompt.id,
        key=key or sha256(json.dumps([judge, protocol, item.prompt.id, *texts])),
        protocol=protocol,
        **fields,
        **verdict,
        judge=judge,
        template="t",
        error=error,
        prompt_sha256=prompt_hash(item.prompt),
        answer_sha256=tuple(map(sha256, texts)),
    )


def scored(item, *scores, **others):
    """A judgement for each answer; None for one that failed."""
    return [
        judgement(item, "score", (index,), scores=dict.fromkeys(CRITERIA, score), **others)
        if score is not None
        else judgement(item, "score", (index,), error="prose", **others)
        for index, score in enumerate(scores)
    ]


def voted(item, first, second, p_first, **others):
    error = "time-out" if p_first is None else None
    return judgement(item, "pairwise", (first, second), p_first=p_first, error=error, **others)


def made_of(judgements, *items, **fields):
    return make_comparisons(judgements, items, ComparisonConfig(**fields))


def only(judgements, item, **fields):
    comparisons, _ = made_of(judgements, item, **fields)
    (found,) = comparisons
    return found


TWO = answered("p", "多喝水。", "多休息，多喝水。")


def test_scores_give_every_pair_with_its_margin():
    item = answered("p", "甲", "乙乙", "丙丙丙", kind="real_instruction")
    comparisons, report = made_of(scored(item, 2.0, 4.5, 3.0), item)
    expected = {("乙乙", "甲"): 2.5, ("丙丙丙", "甲"): 1.0, ("乙乙", "丙丙丙"): 1.5}
    assert {
        (one.chosen[0].content, one.rejected[0].content): one.margin for one in comparisons
    } == expected
    assert all(one.p_chosen == 1.0 for one in comparisons)
    assert [one.id for one in comparisons] == ["p:1-0", "p:1-2", "p:2-0"]
    assert comparisons[0].messages == item.prompt.messages
    assert comparisons[0].extra == {
        "kind": "real_instruction",
        "judge": "judge",
        "template": "t",
        "chosen_answer": 1,
        "rejected_answer": 0,
    }
    assert (report.num_judgements, report.num_pairs, report.num_own) == (3, 3, 3)


def test_the_criterion_decides():
    low, high = (dict.fromkeys(CRITERIA, score) for score in (2.0, 3.0))
    judgements = [
        judgement(TWO, "score", (0,), scores={**low, "coherent": 5.0}),
        judgement(TWO, "score", (1,), scores={**high, "coherent": 1.0}),
    ]
    assert only(judgements, TWO).id == "p:1-0"
    found = only(judgements, TWO, criterion="coherent")
    assert (found.id, found.margin) == ("p:0-1", 4.0)


def test_ties_are_dropped_or_kept_as_a_half():
    judgements = scored(TWO, 3.0, 3.25)
    comparisons, report = made_of(judgements, TWO, tie_margin=0.25)
    assert comparisons == [] and report.pairs_left_out == {made.TIE: 1}
    found = only(judgements, TWO, tie_margin=0.25, ties="half")
    assert (found.p_chosen, found.margin, found.id) == (0.5, -0.25, "p:0-1")
    assert only(judgements, TWO, tie_margin=0.2).p_chosen == 1.0


def test_score_differences_give_soft_labels_with_bradley_terrys_cross_entropy():
    """Of both losses that take them; least where the rewards differ as the scores say."""
    item = answered("p", "甲", "乙乙", "丙丙丙")
    scale, scores = 0.5, {"甲": 2.0, "乙乙": 4.5, "丙丙丙": 4.25}
    comparisons, _ = made_of(scored(item, *scores.values()), item, score_scale=scale)
    p = np.array([one.p_chosen for one in comparisons])
    better, worse = (
        np.array([scores[getattr(one, side)[0].content] for one in comparisons])
        for side in ("chosen", "rejected")
    )
    # Two players of strengths exp(score / scale).
    np.testing.assert_allclose(
        p, np.exp(better / scale) / (np.exp(better / scale) + np.exp(worse / scale))
    )
    assert len(p) == 3 and (p > 0.5).all() and p.min() == pytest.approx(1 / (1 + np.exp(-0.5)))

    differences = np.array([0.3, -1.2, 2.0], np.float32)
    by_hand = -(p * np.log(1 / (1 + np.exp(-differences))))
    by_hand -= (1 - p) * np.log(1 / (1 + np.exp(differences)))
    zeros, every = jnp.zeros(3), jnp.ones(3, bool)

    def reward_model(differences):
        return pair_losses(differences, zeros, p_chosen=jnp.asarray(p, jnp.float32)).sum()

    def dpo(differences):
        log_probs = differences / 0.1
        labels = jnp.asarray(p, jnp.float32)
        return dpo_loss(log_probs, zeros, zeros, zeros, labels, every, beta=0.1).loss

    for loss in (reward_model, dpo):
        assert float(loss(differences)) == pytest.approx(by_hand.sum(), rel=1e-5)
        at_least = jax.grad(loss)(jnp.asarray((better - worse) / scale, jnp.float32))
        np.testing.assert_allclose(at_least, 0, atol=1e-5)


def test_a_scale_of_scores_without_scores_is_refused():
    with pytest.raises(
        ValueError, match="score_scale is for scores; these judgements are pairwise"
    ):
        made_of([voted(TWO, 0, 1, 1.0), voted(TWO, 1, 0, 0.0)], TWO, score_scale=1.0)


def test_a_failed_judgement_never_becomes_a_number():
    item = answered("p", "甲", "乙", "丙")
    comparisons, report = made_of(scored(item, 2.0, None, 3.0), item)
    assert [one.id for one in comparisons] == ["p:2-0"]
    assert report.judgements_left_out == {questions.FAILED: 1}
    assert report.pairs_left_out == {made.JUDGEMENT_FAILED: 2}
    pairs = [voted(TWO, 0, 1, 1.0), voted(TWO, 1, 0, None)]
    comparisons, report = made_of(pairs, TWO)
    assert comparisons == [] and report.pairs_left_out == {made.JUDGEMENT_FAILED: 1}


def test_a_later_verdict_supersedes_a_failure():
    failed = scored(TWO, None, None)
    good = scored(TWO, 1.0, 2.0)
    comparisons, report = made_of(failed + good, TWO)
    assert len(comparisons) == 1
    assert report.num_judgements == 2 and report.judgements_left_out == {}


def test_probabilities_are_averaged_in_log_odds():
    # Shown first, answer 0 has 0.9; shown second it has 1 - 0.6.
    found = only([voted(TWO, 0, 1, 0.9), voted(TWO, 1, 0, 0.6)], TWO)
    mean = (math.log(0.9 / 0.1) + math.log(0.4 / 0.6)) / 2
    assert found.id == "p:0-1" and found.margin is None
    assert found.p_chosen == pytest.approx(1 / (1 + math.exp(-mean)))


def test_an_additive_position_bias_cancels_in_the_average():
    for difference, bias in itertools.product((-3.0, -0.1, 0.0, 2.0), (-2.0, 0.5, 7.0)):
        both = Verdicts((probability(difference + bias),), (probability(-difference + bias),))
        combined = both.combined()
        assert log_odds(combined.p_one) == pytest.approx(difference, abs=1e-9)
        assert combined.contradicts == (abs(bias) > abs(difference))


@pytest.mark.parametrize(
    ("one_first", "other_first", "p_one"),
    [(1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.5, 0.75), (0.5, 1.0, 0.25), (1 - 1e-9, 0.0, 1.0)],
)
def test_votes_are_averaged(one_first, other_first, p_one):
    found = only([voted(TWO, 0, 1, one_first), voted(TWO, 1, 0, other_first)], TWO)
    assert found.id == ("p:0-1" if p_one > 0.5 else "p:1-0")
    assert found.p_chosen == max(p_one, 1 - p_one)


@pytest.mark.parametrize("certain", [1 - 1e-6, 1 - 1e-9, 1 - 1e-12, 1.0])
@pytest.mark.parametrize("other", [0.02, 0.4, 0.9])
def test_a_certain_verdict_counts_the_same_however_its_judge_rounds_it(certain, other):
    bound = math.log((1 - 1e-6) / 1e-6)
    expected = 1 / (1 + math.exp(-(bound - math.log(other / (1 - other))) / 2))
    assert Verdicts((certain,), (other,)).combined().p_one == pytest.approx(expected, abs=1e-12)
    against = Verdicts((1 - certain,), (1 - other,)).combined()
    assert against.p_one == pytest.approx(1 - expected, abs=1e-12)
    # A probability that is not quite certain gives nearly the same.
    near = Verdicts((1 - 1.1e-6,), (other,)).combined()
    assert near.p_one == pytest.approx(expected, abs=0.02)


def test_scores_that_are_a_tie_keep_the_sign_of_their_margin():
    """Chosen less rejected, whichever of the two is written down as the chosen one."""
    for scores in ((6.0, 6.8), (6.8, 6.0), (6.0, 6.0)):
        found = only(scored(TWO, *scores), TWO, tie_margin=1.0, ties="half")
        of = dict(zip(TWO.answers, scores, strict=True))
        expected = of[found.chosen[0].content] - of[found.rejected[0].content]
        assert (found.p_chosen, found.margin) == (0.5, expected)
        assert type(found).from_json(found.to_json()).margin == expected


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_votes_that_disagree_are_a_half_or_dropped(p):
    pairs = [voted(TWO, 0, 1, p), voted(TWO, 1, 0, p)]
    assert only(pairs, TWO).p_chosen == 0.5
    comparisons, report = made_of(pairs, TWO, disagreement="drop")
    assert comparisons == [] and report.pairs_left_out == {made.DISAGREEMENT: 1}


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_a_verdict_of_a_half_is_a_tie(p):
    pairs = [voted(TWO, 0, 1, p), voted(TWO, 1, 0, p)]
    comparisons, report = made_of(pairs, TWO)
    assert comparisons == [] and report.pairs_left_out == {made.TIE: 1}
    assert only(pairs, TWO, ties="half").p_chosen == 0.5


def test_one_order_alone_is_no_comparison():
    comparisons, report = made_of([voted(TWO, 0, 1, 1.0)], TWO)
    assert comparisons == [] and report.pairs_left_out == {made.ONE_ORDER: 1}


def test_equal_texts_and_pairs_that_were_not_judged_are_counted():
    item = answered("p", "甲", "乙", "甲", "丙")
    comparisons, report = made_of([voted(item, 0, 1, 1.0), voted(item, 1, 0, 0.0)], item)
    assert [one.id for one in comparisons] == ["p:0-1"]
    assert report.pairs_left_out == {made.SAME_TEXT: 1, made.NOT_JUDGED: 4}


def test_judgements_of_other_texts_are_left_out():
    other = answered("p", "多喝水。", "别的话。")
    strange = answered("q", "甲", "乙")
    longer = answered("p", "多喝水。", "多休息，多喝水。", "丙")
    judgements = [
        *scored(TWO, 1.0, None),
        scored(other, 1.0, 5.0, key="k2")[1],
        *scored(strange, 1.0, 2.0),
        scored(longer, 1.0, 2.0, 5.0)[2],
    ]
    comparisons, report = made_of(judgements, TWO)
    assert comparisons == []
    assert report.judgements_left_out == {
        questions.OTHER_TEXT: 1,
        questions.NO_PROMPT: 3,
        questions.FAILED: 1,
    }
    with pytest.raises(ValueError, match="none of the 2 judgements is of these answers"):
        made_of(scored(strange, 1.0, 2.0), TWO)
    same_answers = Answered(
        dataclasses.replace(TWO.prompt, messages=(Message("user", "别的"),)), TWO.answers
    )
    with pytest.raises(ValueError, match=questions.OTHER_TEXT):
        made_of(scored(TWO, 1.0, 2.0), same_answers)


def test_several_judges_or_protocols_need_a_choice():
    judgements = [
        *scored(TWO, 1.0, 2.0),
        *scored(TWO, 2.0, 1.0, judge="second"),
        voted(TWO, 0, 1, 0.7),
        voted(TWO, 1, 0, 0.2),
    ]
    with pytest.raises(ValueError, match="judge='second' protocol='score'"):
        made_of(judgements, TWO)
    with pytest.raises(ValueError, match="choose one"):
        made_of(judgements, TWO, judge="judge")
    assert only(judgements, TWO, judge="second").id == "p:0-1"
    assert only(judgements, TWO, judge="judge", protocol="score").id == "p:1-0"
    assert only(judgements, TWO, protocol="pairwise").margin is None
    with pytest.raises(ValueError, match="no judgement with judge='third'"):
        made_of(judgements, TWO, judge="third")


def test_a_question_judged_twice_counts_with_its_mean():
    judgements = scored(TWO, 1.0, 2.0) + scored(TWO, 4.0, 2.0, key="k2")
    found = only(judgements, TWO)
    assert (found.id, found.margin) == ("p:0-1", 0.5)


def simulated(num_prompts=12, num_answers=5, seed=3):
    """Answers of random length and source, with scores, some of them failed."""
    draw = random.Random(seed)
    items, judgements = [], []
    for index in range(num_prompts):
        texts = ["药" * draw.randint(1, 30) + str(place) for place in range(num_answers)]
        source = "clinic" if index % 4 else "hospital"
        item = answered(f"p{index}", *texts, turns=1 + index % 3, source=source)
        items.append(item)
        # Longer answers tend to win.
        scores = [
            None if draw.random() < 0.1 else round(len(text) / 10 + draw.gauss(0, 1), 1)
            for text in texts
        ]
        judgements += scored(item, *scores)
    return items, judgements


def test_the_order_of_arrival_changes_nothing():
    items, judgements = simulated()
    cfg = ComparisonConfig(max_pairs_per_prompt=6, max_length_ratio=1.0, max_source_ratio=3.0)
    expected = make_comparisons(judgements, items, cfg)
    for seed in range(3):
        random.Random(seed).shuffle(judgements)
        random.Random(seed).shuffle(items)
        found = make_comparisons(judgements, items, cfg)
        assert found == expected
        assert json.dumps(found[1].to_json()) == json.dumps(expected[1].to_json())
    ids = [one.id for one in expected[0]]
    assert ids == sorted(ids) and len(set(ids)) == len(ids)


def test_every_judgement_and_pair_is_accounted_for():
    items, judgements = simulated()
    for fields in ({}, {"max_pairs_per_prompt": 3, "max_turns_ratio": 1.0, "ties": "half"}):
        comparisons, report = made_of(judgements, *items, **fields)
        assert report.num_judgements == len(judgements) == 60
        assert report.num_pairs == 12 * math.comb(5, 2)
        assert report.num_pairs == report.num_own + sum(report.pairs_left_out.values())
        assert report.num_comparisons == len(comparisons) == report.num_own
        failed = sum(one.failed for one in judgements)
        assert report.judgements_left_out == {questions.FAILED: failed}
        assert json.loads(json.dumps(report.to_json()))["num_pairs"] == report.num_pairs
        assert f"{len(comparisons)} comparisons from judge (score)" in report.text()


def test_at_most_k_pairs_of_a_prompt_chosen_by_seed():
    items, judgements = simulated()
    full, _ = made_of(judgements, *items)
    chosen = [made_of(judgements, *items, max_pairs_per_prompt=2, seed=seed)[0] for seed in (0, 1)]
    for found in chosen:
        assert {one.id for one in found} <= {one.id for one in full}
        per_prompt = Counter(one.group for one in found)
        assert set(per_prompt.values()) == {2}
    assert chosen[0] != chosen[1]


def longer_wins(comparisons):
    lengths = [(len(one.chosen[0].content), len(one.rejected[0].content)) for one in comparisons]
    return Counter(chosen > rejected for chosen, rejected in lengths if chosen != rejected)


def test_balance_of_length_source_and_turns():
    items, judgements = simulated(num_prompts=24)
    plain, _ = made_of(judgements, *items)
    assert longer_wins(plain)[True] > 2 * longer_wins(plain)[False]
    found, report = made_of(judgements, *items, max_length_ratio=1.0)
    assert longer_wins(found)[True] == longer_wins(found)[False] == longer_wins(plain)[False]
    assert report.pairs_left_out[balancing.LENGTH] == len(plain) - len(found)
    found, _ = made_of(judgements, *items, max_source_ratio=1.5)
    sources = Counter(one.source for one in found)
    assert sources["hospital"] < sources["clinic"] == int(1.5 * sources["hospital"])
    found, _ = made_of(
        judgements, *items, max_length_ratio=1.2, max_source_ratio=1.0, max_turns_ratio=1.0
    )
    sources = Counter(one.source for one in found)
    turns = Counter(len(one.messages) for one in found)
    assert longer_wins(found)[True] <= 1.2 * longer_wins(found)[False]
    assert len(set(sources.values())) == 1 and len(sources) == 2
    assert len(set(turns.values())) == 1 and len(turns) == 3


def test_ties_and_equal_lengths_are_outside_of_the_balance_of_length():
    long, tie = answered("p", "水", "水水", "药"), answered("q", "水", "水水")
    short = answered("r", "水", "水水")
    judgements = scored(long, 1.0, 2.0, 3.0) + scored(tie, 2.0, 2.0) + scored(short, 2.0, 1.0)
    found, _ = made_of(judgements, long, tie, short, ties="half", max_length_ratio=1.0)
    # p:2-0 has equal lengths, q:0-1 is a tie; p:1-0 longer; p:2-1 and r:0-1 shorter, one of them.
    ids = {one.id for one in found}
    assert {"p:2-0", "q:0-1", "p:1-0"} < ids and len(ids) == 4


def test_a_balance_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="longer answer chosen"):
        made_of(scored(TWO, 1.0, 2.0), TWO, max_length_ratio=2.0)
    # The only short winner is in the large source, which the small one allows a single pair of.
    one, two = answered("a", "水", "水水", source="x"), answered("b", "水", "水水", source="y")
    three = answered("c", "水", "水水", source="y")
    judgements = scored(one, 1.0, 2.0) + scored(two, 1.0, 2.0) + scored(three, 2.0, 1.0)
    found, report = made_of(judgements, one, two, three, max_source_ratio=1.0)
    assert len(found) == 2 and report.pairs_left_out == {balancing.SOURCE: 1}
    seeds = range(20)
    outcomes = set()
    for seed in seeds:
        try:
            found, _ = made_of(
                judgements, one, two, three, max_source_ratio=1.0, max_length_ratio=1.0, seed=seed
            )
            outcomes.add(len(found))
        except ValueError as error:
            assert "no comparison is left" in str(error)
            outcomes.add("refused")
    assert outcomes == {2, "refused"}


def test_the_file_is_read_back_as_it_was(tmp_path):
    items, judgements = simulated()
    expected, _ = made_of(judgements, *items)
    path = tmp_path / "out" / "comparisons.jsonl"
    write_comparisons(path, expected)
    assert list(read_comparisons(path)) == expected
    before = path.read_bytes()
    write_comparisons(path, expected)
    assert path.read_bytes() == before
    broken = dataclasses.replace(expected[0], margin=math.nan)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_comparisons(path, [*expected, broken])
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_other_files_are_mixed_in_without_their_margins(tmp_path):
    mixed = tmp_path / "general.jsonl"
    rows = [
        {
            "question": f"问题{n}",
            "response_chosen": f"好{n}",
            "response_rejected": "差",
            "margin": 9,
        }
        for n in range(20)
    ]
    rows += [{"question": "同", "response_chosen": "好", "response_rejected": "好"}]
    mixed.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    items, judgements = simulated()
    own, _ = made_of(judgements, *items)
    found, report = made_of(judgements, *items, mix=(MixedFile(path=str(mixed), limit=8),))
    foreign = [one for one in found if one not in own]
    assert len(foreign) == 8 and len(found) == len(own) + 8
    assert all(one.margin is None and one.id.startswith("general/") for one in foreign)
    assert report.mixed == {str(mixed): 8}
    assert sum(report.mixed_left_out.values()) == 13
    assert [one.id for one in found] == sorted(one.id for one in found)
    few, _ = made_of(judgements, *items, mix=(MixedFile(path=str(mixed), per_own=0.05),))
    assert len(few) == len(own) + int(0.05 * len(own))
    with pytest.raises(ValueError, match="is repeated"):
        made_of(judgements, *items, mix=(MixedFile(path=str(mixed)),) * 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("protocol", "ranking"),
        ("criterion", "kind"),
        ("ties", "keep"),
        ("disagreement", "keep"),
        ("score_scale", 0.0),
        ("score_scale", math.nan),
        ("tie_margin", -0.1),
        ("tie_margin", math.nan),
        ("max_pairs_per_prompt", 0),
        ("max_length_ratio", 0.5),
        ("max_source_ratio", math.inf),
        ("max_turns_ratio", 0.0),
    ],
)
def test_a_field_that_cannot_be_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        ComparisonConfig(**{field: value})


def test_a_mixed_file_of_nothing_is_refused():
    for field in ("limit", "per_own"):
        with pytest.raises(ValueError, match=field):
            MixedFile(path="x", **{field: 0})


def test_two_prompts_of_one_id_are_refused():
    with pytest.raises(ValueError, match="'p' twice"):
        made_of(scored(TWO, 1.0, 2.0), TWO, TWO)


def test_log_odds_and_probability_are_inverse_and_complementary():
    for value in np.linspace(-30, 30, 121):
        assert log_odds(probability(-abs(value))) == pytest.approx(-abs(value), rel=1e-12)
        assert probability(value) + probability(-value) == pytest.approx(1.0, abs=1e-15)


def test_real_scored_lists_mix_in(shared_data):
    path = shared_data / "4_preference" / "medicalgpt_reward_test.json"
    found, report = made_of(scored(TWO, 1.0, 2.0), TWO, mix=(MixedFile(path=str(path), limit=10),))
    assert len(found) == 11 and report.mixed == {str(path): 10}
