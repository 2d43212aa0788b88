"""The report against plain loops, and its statistics against a judge whose bias is planted.

The planted judge: the answers of one prompt have utilities u; shown i first and j second it answers
with log-odds `u_i - u_j + bias + noise`, either as a probability or by a vote drawn from it.
"""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from huatuo_jax.core.statistics import Figure, mean_figure
from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.judge import report as statistics
from huatuo_jax.judge.judgements import CRITERIA, Judgement, prompt_hash, sha256
from huatuo_jax.judge.offline import CAVEAT, RUBRIC_NAME
from huatuo_jax.judge.questions import Answered, PairKey, Verdicts, log_odds, pair_verdicts
from huatuo_jax.judge.report import (
    QUANTILES,
    agreement,
    label_report,
    position_bias,
)

ITEMS = 50
BIAS = 0.7
NOISE = 0.5
UTILITIES = np.random.default_rng(11).normal(0.0, 1.5, ITEMS)


def logistic(x):
    return 1 / (1 + np.exp(-x))


def answered(prompt_id="p", texts=tuple("药" * (1 + n) for n in range(ITEMS))):
    return Answered(
        Prompt(prompt_id, (Message("user", f"头痛 {prompt_id}"),), "test"), tuple(texts)
    )


def judgement(item, shown, *, judge="planted", error=None, cost=None, **verdict):
    score = len(shown) == 1
    places = {"answer": shown[0]} if score else {"first": shown[0], "second": shown[1]}
    texts = [item.answers[index] for index in shown]
    fields = {"template": "t", "key": sha256(json.dumps([judge, item.prompt.id, *texts]))}
    return Judgement(
        id=item.prompt.id,
        protocol="score" if score else "pairwise",
        **{**fields, **places, **verdict},
        judge=judge,
        error=error,
        cost=cost,
        prompt_sha256=prompt_hash(item.prompt),
        answer_sha256=tuple(map(sha256, texts)),
    )


def planted(
    item, *, votes, utilities=UTILITIES, bias=BIAS, noise=NOISE, seed=1, pairs=None, **others
):
    """Both orders of every pair; a number for each (pair, order), drawn independently."""
    draw = np.random.default_rng(seed)
    found = []
    for one, other in pairs or itertools.combinations(range(len(item.answers)), 2):
        for first, second in ((one, other), (other, one)):
            noisy = utilities[first] - utilities[second] + bias + noise * draw.normal()
            p_first = float(draw.random() < logistic(noisy)) if votes else float(logistic(noisy))
            found.append(judgement(item, (first, second), p_first=p_first, **others))
    return found


def differences(pairs=None):
    pairs = list(pairs or itertools.combinations(range(ITEMS), 2))
    return np.array([UTILITIES[one] - UTILITIES[other] for one, other in pairs])


def near(figure, expected, *, deviations=3.5):
    """Whether the expected value lies within so many standard errors; 3.5 is 1 in 2,000."""
    return abs(figure.value - expected) < deviations * figure.standard_error


def position_of(judgements):
    (part,) = label_report(judgements, [answered()]).parts
    return part.position


def test_planted_probabilities_give_the_bias_and_the_flip_rate_of_the_closed_form():
    found = position_of(planted(answered(), votes=False))
    d, cdf = differences(), stats.norm.cdf
    # Noise of both orders is averaged: known standard error.
    assert found.log_odds.standard_error == pytest.approx(NOISE / math.sqrt(2 * len(d)), rel=0.1)
    assert near(found.log_odds, BIAS)
    flips = cdf((d + BIAS) / NOISE) * cdf((BIAS - d) / NOISE) + cdf(-(d + BIAS) / NOISE) * cdf(
        (d - BIAS) / NOISE
    )
    assert near(found.flip_rate, flips.mean())
    assert (found.from_votes, found.undecided, found.flip_rate.num_items) == (False, 0, 1225)
    # Without noise there is nothing to estimate.
    exact = position_of(planted(answered(), votes=False, noise=0.0))
    assert exact.log_odds.value == pytest.approx(BIAS, abs=1e-12)
    assert exact.flip_rate.value == np.mean(np.abs(d) < BIAS)
    expected = (logistic(d + BIAS) + logistic(BIAS - d)).mean() / 2 - 0.5
    assert exact.first_excess.value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bias", [-1.2, 0.0, BIAS])
def test_planted_votes_give_the_bias_and_the_flip_rate_of_the_closed_form(bias):
    found = position_of(planted(answered(), votes=True, bias=bias, noise=0.0))
    d = differences()
    twice_first = logistic(d + bias) * logistic(bias - d)
    twice_second = logistic(-d - bias) * logistic(d - bias)
    assert near(found.flip_rate, (twice_first + twice_second).mean())
    assert near(found.log_odds, bias) and found.from_votes
    assert found.log_odds.num_items == round(found.flip_rate.value * len(d))
    expected = (logistic(d + bias) + logistic(bias - d)).mean() / 2 - 0.5
    assert near(found.first_excess, expected)


def test_the_standard_errors_are_those_of_repeated_samples():
    """Over 200 seeds (z - true) / error is a standard normal: Kolmogorov-Smirnov."""
    pairs = [(one, one + 1) for one in range(0, ITEMS, 2)] * 8
    d = differences(pairs)
    twice = logistic(d + BIAS) * logistic(BIAS - d) + logistic(-d - BIAS) * logistic(d - BIAS)
    scaled = {"bias": [], "flips": [], "excess": []}
    excess = (logistic(d + BIAS) + logistic(BIAS - d)).mean() / 2 - 0.5
    draw = np.random.default_rng(5)
    for _ in range(200):
        first, second = draw.random((2, len(d))) < logistic(np.array([d + BIAS, BIAS - d]))
        verdicts = {
            PairKey("p", place, len(d)): Verdicts((float(one),), (float(other),))
            for place, (one, other) in enumerate(zip(first, second, strict=True))
        }
        found = position_bias(verdicts)
        for name, figure, true in (
            ("bias", found.log_odds, BIAS),
            ("flips", found.flip_rate, twice.mean()),
            ("excess", found.first_excess, excess),
        ):
            scaled[name].append((figure.value - true) / figure.standard_error)
    # The items differ in d, so that the sample's spread overstates the error a little.
    for name, values in scaled.items():
        assert abs(np.mean(values)) < 3.5 / math.sqrt(200), name
        assert 0.8 < np.std(values) < 1.15, (name, np.std(values))
    assert stats.kstest(scaled["bias"], "norm").pvalue > 0.01


def with_certain(log_odds_N2, certain, *, every):
    """Verdicts of both orders, one of each so many pairs replaced by a certain one."""
    verdicts = {}
    for place, both in enumerate(logistic(log_odds_N2).tolist()):
        if place % every == 0:
            both[place // every % 2] = certain[place // every % len(certain)]
        verdicts[PairKey(f"p{place}", 0, 1)] = Verdicts((both[0],), (both[1],))
    return verdicts


CERTAIN = {
    "exactly 1": (1.0,),
    "exactly 0 or 1": (1.0, 0.0),
    "nearly 1": (1 - 1e-9,),
    "nearly 0 or 1": (1e-12, 1 - 1e-7),
}


@pytest.mark.parametrize("certain", CERTAIN.values(), ids=CERTAIN.keys())
@pytest.mark.parametrize("every", [300, 5, 2])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_certain_verdicts_leave_the_planted_bias_as_it_is(certain, every, noise):
    draw = np.random.default_rng(17)
    d = draw.normal(0.0, 2.0, 300)
    log_odds_N2 = np.stack([d + 0.8, 0.8 - d], axis=1) + noise * draw.normal(size=(300, 2))
    found = position_bias(with_certain(log_odds_N2, certain, every=every))
    assert not found.from_votes and found.left_out >= 300 // every
    assert found.log_odds.num_items == 300 - found.left_out
    if noise:
        expected = noise / math.sqrt(2 * found.log_odds.num_items)
        assert found.log_odds.standard_error == pytest.approx(expected, rel=0.15)
        assert near(found.log_odds, 0.8)
    else:
        assert found.log_odds.value == pytest.approx(0.8, abs=1e-9)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_judge_that_is_often_certain_has_the_bias_of_its_other_verdicts(noise):
    """Answers so far apart that most probabilities are rounded to 0 or 1, as of float32."""
    errors = []
    for seed in range(100):
        draw = np.random.default_rng(seed)
        d = draw.normal(0.0, 20.0, 300)
        log_odds_N2 = np.stack([d + 0.8, 0.8 - d], axis=1) + noise * draw.normal(size=(300, 2))
        rounded = logistic(log_odds_N2).astype(np.float32).astype(float).tolist()
        verdicts = {
            PairKey(f"p{place}", 0, 1): Verdicts((one,), (other,))
            for place, (one, other) in enumerate(rounded)
        }
        found = position_bias(verdicts)
        assert 150 < found.left_out < 270 and not found.from_votes
        if noise:
            errors.append((found.log_odds.value - 0.8) / found.log_odds.standard_error)
        else:
            assert found.log_odds.value == pytest.approx(0.8, abs=0.05)
    if noise:  # Standard normal.
        assert abs(np.mean(errors)) < 3.5 / math.sqrt(100)
        assert 0.8 < np.std(errors) < 1.2


def test_votes_are_read_alike_however_their_judge_rounds_them():
    draw = np.random.default_rng(3)
    votes_N2 = draw.random((400, 2)) < logistic(0.8 + np.zeros((400, 2)))
    found = [
        position_bias(
            {
                PairKey(f"p{place}", 0, 1): Verdicts(
                    (high if one else low,), (high if other else low,)
                )
                for place, (one, other) in enumerate(votes_N2)
            }
        )
        for low, high in ((0.0, 1.0), (1e-9, 1 - 1e-9))
    ]
    assert found[0].from_votes and found[0].log_odds == found[1].log_odds
    assert found[0].flip_rate == found[1].flip_rate
    assert near(found[0].log_odds, 0.8)


def recovered(judgements, *, orders):
    """The utilities that the log-odds of all pairs fit by least squares: the mean of each row."""
    log_odds_NN = np.zeros((ITEMS, ITEMS))
    for key, verdicts in pair_verdicts(judgements).items():
        if orders == "both":
            log_odds_NN[key.one, key.other] = log_odds(verdicts.combined().p_one)
        else:
            # The order of the file, the same for all pairs: the lower place is shown first.
            log_odds_NN[key.one, key.other] = log_odds(verdicts.one_first[0])
    return (log_odds_NN - log_odds_NN.T).mean(axis=1)


@pytest.mark.parametrize("bias", [BIAS, 3.0])
def test_averaging_both_orders_recovers_the_utilities(bias):
    """50 items, all 1,225 pairs, noise 0.5 in the log-odds of each order."""
    judgements = planted(answered(), votes=False, bias=bias)
    found = recovered(judgements, orders="both")
    assert np.corrcoef(found, UTILITIES)[0, 1] > 0.995
    # 0.5 / sqrt(2) of noise a pair, averaged over 50 of them.
    assert np.std(found - (UTILITIES - UTILITIES.mean())) < 2 * NOISE / math.sqrt(2 * ITEMS)


def test_one_fixed_order_does_not_recover_the_utilities():
    """Items in the order of the file are shown first ITEMS - 1 times down to never.

    The bias then adds `bias * (ITEMS - 1 - 2 * place) / ITEMS` to the item at that place, a slope
    along the file that more pairs never average away. A random order of each pair would only add
    noise; a fixed order of the items adds a utility of their own.
    """
    judgements = planted(answered(), votes=False, bias=3.0)
    found = recovered(judgements, orders="one")
    slope = 3.0 * (ITEMS - 1 - 2 * np.arange(ITEMS)) / ITEMS
    assert np.corrcoef(found, UTILITIES)[0, 1] < 0.8
    expected = UTILITIES - UTILITIES.mean() + slope
    assert np.corrcoef(found, expected)[0, 1] > 0.995
    # Also where the bias is small it costs what averaging does not.
    judgements = planted(answered(), votes=False, bias=BIAS)
    one, both = (
        np.corrcoef(recovered(judgements, orders=orders), UTILITIES)[0, 1]
        for orders in ("one", "both")
    )
    assert one < 0.985 < 0.995 < both


def test_a_mean_with_its_error_by_plain_loops():
    draw = np.random.default_rng(2)
    values = draw.normal(size=90).tolist()
    few = mean_figure(values, ["a", "b", "c"] * 30)
    assert few.value == pytest.approx(np.mean(values))
    assert few.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(90))
    # In groups of three equal values the error is that of the 30 distinct ones.
    distinct = values[:30]
    tripled = mean_figure(distinct * 3, [str(n) for n in range(30)] * 3)
    assert tripled.standard_error == pytest.approx(np.std(distinct, ddof=1) / math.sqrt(30))
    assert mean_figure([], []) == Figure(None, None, 0)
    assert mean_figure([2.0], ["a"]) == Figure(2.0, None, 1)


def test_kappa_is_cohens_over_both_ways_to_write_a_pair():
    draw = np.random.default_rng(4)
    sides = draw.choice([0.0, 0.5, 1.0], size=300, p=[0.4, 0.2, 0.4])
    others = np.where(draw.random(300) < 0.6, sides, draw.choice([0.0, 0.5, 1.0], size=300))
    keys = [PairKey("p", 0, 1 + place) for place in range(300)]
    extra = {PairKey("q", 0, 1): 1.0}
    found = agreement(
        dict(zip(keys, sides, strict=True)) | extra, dict(zip(keys, others, strict=True))
    )
    pairs = [*zip(sides, others, strict=True), *zip(1 - sides, 1 - others, strict=True)]
    same = sum(a == b for a, b in pairs) / 600
    chance = sum(
        sum(a == side for a, _ in pairs) * sum(b == side for _, b in pairs) / 600**2
        for side in (0.0, 0.5, 1.0)
    )
    assert found.same.value == pytest.approx(same)
    assert found.kappa.value == pytest.approx((same - chance) / (1 - chance))
    error = math.sqrt(same * (1 - same) / 299) / (1 - chance)
    assert found.kappa.standard_error == pytest.approx(error)
    decided = [(a, b) for a, b in pairs if 0.5 not in (a, b)]
    assert found.same_of_decided.value == pytest.approx(np.mean([a == b for a, b in decided]))
    assert found.same_of_decided.num_items == len(decided) // 2


def test_kappa_is_1_for_one_judge_and_near_0_for_two_that_guess():
    draw = np.random.default_rng(8)
    keys = [PairKey("p", 0, 1 + place) for place in range(2000)]
    one, other = (
        dict(zip(keys, draw.choice([0.2, 0.9], size=2000), strict=True)) for _ in range(2)
    )
    assert agreement(one, one).kappa.value == 1.0
    assert near(agreement(one, other).kappa, 0.0)
    ties = dict.fromkeys(keys, 0.5)
    assert agreement(ties, ties).kappa.value is None


def scored(item, scores, **others):
    return [
        judgement(item, (index,), scores=dict.fromkeys(CRITERIA, score), **others)
        if score is not None
        else judgement(item, (index,), error="prose, no JSON", **others)
        for index, score in enumerate(scores)
    ]


def test_a_report_of_scores_by_plain_loops():
    draw = np.random.default_rng(3)
    items, judgements, margins, wins, ties = [], [], [], [], []
    for number in range(30):
        item = answered(f"p{number}", ["药" * int(size) for size in draw.permutation(9)[:4] + 1])
        scores = [float(score) for score in draw.integers(1, 6, size=4)]
        if number % 10 == 0:
            scores[2] = None
        items.append(item)
        judgements += scored(item, scores, cost=0.25)
        for one, other in itertools.combinations(range(4), 2):
            if None in (scores[one], scores[other]):
                continue
            margins.append(abs(scores[one] - scores[other]))
            ties.append(margins[-1] == 0)
            if margins[-1]:
                longer = len(item.answers[one]) > len(item.answers[other])
                wins.append(longer == (scores[one] > scores[other]))
    (part,) = label_report(judgements, items).parts
    assert (part.judgements, part.prompts, part.pairs) == (120, 30, len(margins))
    assert part.failure_rate.value == pytest.approx(3 / 120)
    assert part.errors == {"prose, no JSON": 3}
    assert part.ties.value == pytest.approx(np.mean(ties))
    assert part.longer_wins.value == pytest.approx(np.mean(wins))
    assert part.longer_wins.num_items == len(wins)
    expected = np.quantile(margins, QUANTILES)
    assert list(part.margins.values()) == pytest.approx(list(expected))
    known = [one.scores["overall"] for one in judgements if one.scores]
    assert part.scores["overall"].value == pytest.approx(np.mean(known))
    assert part.cost.money == pytest.approx(30.0) and part.position is None


def test_the_longer_answer_wins_in_verdicts_of_both_orders():
    item = answered("p", ["药", "药药", "药药药", "水水水"])
    verdicts = {(0, 1): (0.2, 0.9), (0, 2): (0.7, 0.2), (1, 2): (0.9, 0.9), (2, 3): (0.9, 0.1)}
    judgements = [
        judgement(item, order, p_first=p)
        for (one, other), both in verdicts.items()
        for order, p in zip(((one, other), (other, one)), both, strict=True)
    ]
    judgements.append(judgement(item, (0, 3), p_first=0.9))
    (part,) = label_report(judgements, [item]).parts
    # 0-1: the longer one. 0-2: the shorter one. 1-2: a tie. 2-3: equal lengths. 0-3: one order.
    assert (part.longer_wins.value, part.longer_wins.num_items) == (0.5, 2)
    assert part.pairs == 4 and part.ties.value == 0.25
    assert part.position.flip_rate.value == 0.25 and part.position.flip_rate.num_items == 4


def test_ties_in_an_order_are_undecided_and_no_flips():
    verdicts = {
        PairKey("p", 0, 1): Verdicts((0.5,), (1.0,)),
        PairKey("p", 0, 2): Verdicts((1.0,), (1.0,)),
        PairKey("p", 0, 3): Verdicts((1.0,), (0.0,)),
        PairKey("p", 0, 4): Verdicts((1.0,), ()),
    }
    found = position_bias(verdicts)
    assert found.undecided == 1
    assert (found.flip_rate.value, found.flip_rate.num_items) == (0.5, 2)
    assert found.first_excess.value == pytest.approx((1.5 + 2 + 1) / 6 - 0.5)
    # One pair prefers the first twice, none the second: log(1.5 / 0.5) / 2.
    assert found.log_odds.value == pytest.approx(math.log(3) / 2)
    assert found.log_odds.standard_error >= math.sqrt(1 / 1.5 + 1 / 0.5) / 2
    assert position_bias({}).log_odds == Figure(None, None, 0)


def test_superseded_failures_cost_but_do_not_count():
    item = answered("p", ["药", "水"])
    lines = [
        *scored(item, [None, None], cost=0.5),
        *scored(item, [2.0, None], cost=1.0),
        *scored(answered("q", ["药", "水"]), [3.0, 3.0]),
    ]
    usage = {"input_tokens": 10, "model": "m"}
    lines = [dataclasses.replace(one, usage=usage, latency_s=2.0) for one in lines]
    (part,) = label_report(lines, [item]).parts
    assert (part.lines, part.judgements, part.other_texts) == (6, 4, 2)
    assert part.failure_rate.value == 0.5 and part.failure_rate.num_items == 2
    assert part.cost.money == 3.0 and part.cost.unknown == 2
    assert part.cost.usage == {"input_tokens": 60} and part.cost.latency_s == (2.0, 2.0)


def test_two_judges_are_two_parts_with_their_agreement():
    item = answered()
    judgements = planted(item, votes=True, noise=0.0)
    judgements += planted(item, votes=False, noise=0.0, bias=0.0, judge="exact")
    judgements += scored(item, [float(u) for u in UTILITIES], judge=RUBRIC_NAME)
    report = label_report(judgements, [item])
    assert [part.judge for part in report.parts] == ["exact", RUBRIC_NAME, "planted"]
    assert [part.note for part in report.parts] == [None, CAVEAT, None]
    exact, offline, _ = (part.name for part in report.parts)
    assert report.agreements[exact, offline].kappa.value == 1.0
    assert len(report.agreements) == 3
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["judges"][2]["position"]["flip_rate"]["num_items"] > 0
    assert plain["agreements"][0]["judges"] == [exact, offline]
    text = report.text()
    for words in ("order flips", "position bias", "the longer answer wins", "kappa", CAVEAT):
        assert words in text
    assert "None" not in text and "Figure" not in text


def test_an_empty_labels_file_and_an_unknown_criterion_are_refused():
    with pytest.raises(ValueError, match="no judgement"):
        label_report([], [answered()])
    with pytest.raises(ValueError, match="criterion is 'kind'"):
        label_report(planted(answered(), votes=True), [answered()], criterion="kind")


def test_a_file_of_failures_only_is_still_reported():
    item = answered("p", ["药", "水"])
    for lines in (scored(item, [None, None]), [judgement(item, (0, 1), error="time-out")]):
        report = label_report(lines, [item])
        assert report.parts[0].failure_rate.value == 1.0
        assert "none to count" in report.text()
        json.dumps(report.to_json(), allow_nan=False)


def test_grouped_errors_need_twenty_prompts():
    assert statistics.LEAST_GROUPS == 20
