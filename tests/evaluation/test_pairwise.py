"""Pairwise judging in both orders, with judges whose verdicts and faults are planted."""

import dataclasses
import json

import numpy as np
import pytest

from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.evaluation.pairwise import (
    ORDERS,
    Contest,
    ballots,
    conversation_template,
    outcomes,
    pairwise_figures,
    read_kuake_qic,
)
from huatuo_jax.judge.judgements import Judgement
from huatuo_jax.judge.labelling import LabelConfig, questions_of

BETTER = {1.0: 1, 0.0: 2, 0.5: 0}


def contest(name, one="多休息，多喝水", other="去医院", *, group="治疗方案", **prompt):
    messages = (Message("user", "感冒怎么办"),)
    return Contest(
        prompt=Prompt(name, messages, "test", **prompt), group=group, one=one, other=other
    )


def verdict(points):
    """A reply that gives so many points to the response shown first."""
    return json.dumps({"reason": "因为", "better": BETTER[points]})


def judged(contests, reply, **keywords):
    """The judgements of a judge: `reply(contest, order)` is its raw reply."""
    by_id = {one.id: one for one in contests}
    return [
        ballot.judgement(reply(by_id[ballot.question.prompt.id], ballot.question.answers))
        for ballot in ballots(contests, judge="planted", settings={}, **keywords)
    ]


def by_table(**points):
    """A judge that gives the first model the points (where shown first, where shown second)."""

    def reply(contest, order):
        first, second = points[contest.id]
        found = first if order == (0, 1) else second
        if found is None:
            return "两个都不错。"
        return verdict(found if order == (0, 1) else 1.0 - found)

    return reply


def test_both_orders_are_asked_with_the_texts_in_either_place():
    found = list(ballots([contest("a", "甲甲", "乙乙")], judge="j", settings={"temperature": 0}))
    assert [one.question.answers for one in found] == [(0, 1), (1, 0)]
    for ballot, texts in zip(found, (("甲甲", "乙乙"), ("乙乙", "甲甲")), strict=True):
        assert ballot.question.texts == texts
        sent = ballot.messages[-1]["content"]
        assert 0 < sent.index(texts[0]) < sent.index(texts[1])
        assert "感冒怎么办" in sent and "没有参考" in sent
    assert found[0].question.key != found[1].question.key


@dataclasses.dataclass
class NamedJudge:
    """A judge as labelling asks it for the keys of its questions."""

    name = "planted"
    settings = {"temperature": 0}
    template: str

    def template_hash(self, protocol):
        return self.template


def test_questions_are_those_of_the_labelling_so_that_no_verdict_is_paid_for_twice():
    contests = [contest("a", reference="多喝水"), contest("b", "x", "y"), contest("c", "z", "z")]
    ours = list(ballots(contests, judge="planted", settings={"temperature": 0}))
    judge = NamedJudge(ours[0].question.template)
    answered = [one.answered for one in contests]
    theirs = questions_of(LabelConfig(protocol="pairwise"), answered, judge)
    assert [one.question for one in ours] == theirs
    assert [one.answers for one in theirs] == [*ORDERS, *ORDERS]


@pytest.mark.parametrize(
    ("shown_first", "shown_second", "outcome"),
    [
        (1.0, 1.0, "win"),
        (1.0, 0.5, "win"),
        (0.5, 1.0, "win"),
        (1.0, 0.0, "tie"),
        (0.0, 1.0, "tie"),
        (0.5, 0.5, "tie"),
        (0.5, 0.0, "loss"),
        (0.0, 0.5, "loss"),
        (0.0, 0.0, "loss"),
        (None, 1.0, None),
        (1.0, None, None),
    ],
)
def test_an_outcome_is_that_of_both_orders_together(shown_first, shown_second, outcome):
    contests = [contest("a")]
    judgements = judged(contests, by_table(a=(shown_first, shown_second)))
    assert outcomes(contests, judgements) == {"a": outcome}


def test_figures_by_intent_count_what_the_judge_said():
    contests = [
        contest("a", group="医疗费用"),
        contest("b", group="医疗费用"),
        contest("c", group="治疗方案"),
        contest("d", group="治疗方案"),
        contest("e", "一样", "一样", group="治疗方案"),
    ]
    table = {"a": (1.0, 1.0), "b": (1.0, 0.0), "c": (0.5, 0.0), "d": (None, 0.0)}
    found = pairwise_figures(contests, judged(contests, by_table(**table)))
    whole = found.overall
    assert (whole.wins, whole.ties, whole.losses, whole.failed) == (1, 2, 1, 1)
    assert (whole.points, whole.other_points) == (2.0 + 1.0 + 0.5 + 1.0, 0.0 + 1.0 + 1.5 + 1.0)
    assert whole.score_ratio == pytest.approx(4.5 / 3.5)
    assert whole.share["value"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert list(found.groups) == ["医疗费用", "治疗方案"]
    costs, treatment = found.groups.values()
    assert (costs.wins, costs.ties, costs.losses, costs.failed) == (1, 1, 0, 0)
    assert costs.score_ratio == 3.0
    assert (treatment.wins, treatment.ties, treatment.losses, treatment.failed) == (0, 1, 1, 1)
    assert (found.orders_disagree, found.same) == (1, 1)
    assert found.unparsed == {"one_first": 1, "other_first": 0}
    assert found.failures == {"unreadable": 1}
    assert json.loads(json.dumps(found.to_json()))["judge"] == "planted"


def test_a_model_that_never_loses_a_point_has_no_ratio_and_no_error():
    contests = [contest("a")]
    found = pairwise_figures(contests, judged(contests, by_table(a=(1.0, 1.0)))).overall
    assert (found.points, found.other_points, found.score_ratio) == (2.0, 0.0, None)


@pytest.mark.parametrize(
    "raw",
    ["", "回答一更好", '{"better": 1}', '{"reason": "x", "better": "1"}', verdict(1.0)[:-1], "1"],
)
def test_a_reply_without_a_verdict_is_none_with_its_text_and_reason(raw):
    ballot = next(ballots([contest("a")], judge="j", settings={}))
    found = ballot.judgement(raw)
    assert found.p_first is None and found.raw == raw and found.error
    assert ballot.judgement(verdict(1.0), finish_reason="length").p_first is None


def test_a_later_verdict_takes_the_place_of_a_failure_and_both_are_kept():
    contests = [contest("a")]
    first = judged(contests, by_table(a=(None, 1.0)))
    again = judged(contests, by_table(a=(0.0, 1.0)))[:1]
    assert outcomes(contests, first) == {"a": None}
    found = pairwise_figures(contests, [*first, *again])
    assert found.overall.ties == 1 and found.overall.failed == 0
    assert found.failures == {"unreadable": 1} and sum(found.unparsed.values()) == 0
    lines = [json.dumps(one.to_json()) for one in (*first, *again)]
    back = [Judgement.from_json(json.loads(line)) for line in lines]
    assert pairwise_figures(contests, back) == found


def test_a_verdict_stands_against_a_later_one_on_the_same_question():
    contests = [contest("a")]
    first, later = (judged(contests, by_table(a=table)) for table in ((1.0, 1.0), (0.0, 0.0)))
    assert outcomes(contests, [*first, *later]) == {"a": "win"}


def test_verdicts_on_other_texts_are_set_aside_and_counted():
    before, now = [contest("a", "旧的", "去医院")], [contest("a", "新的", "去医院")]
    table = by_table(a=(1.0, 1.0))
    found = pairwise_figures(now, [*judged(before, table), *judged(now, by_table(a=(0.0, 0.0)))])
    assert found.overall.losses == 1 and found.overall.wins == 0
    assert list(found.set_aside.values()) == [2]


def test_two_judges_or_templates_are_not_mixed():
    contests = [contest("a")]
    table = by_table(a=(1.0, 1.0))
    other = judged(contests, table, template=conversation_template())
    with pytest.raises(ValueError, match="more than one kind of judgement"):
        pairwise_figures(contests, judged(contests, table) + other)
    with pytest.raises(ValueError, match="no judgement"):
        pairwise_figures(contests, [])


def test_equal_responses_alone_are_ties_without_any_judge():
    found = pairwise_figures([contest("a", "x", "x"), contest("b", "", " ")], [])
    assert (found.judge, found.template, found.overall.ties, found.same) == (None, None, 2, 2)
    assert found.position_bias is None and found.overall.score_ratio == 1.0


def test_contests_need_to_be_there_and_to_have_ids_of_their_own():
    with pytest.raises(ValueError, match="there are none"):
        pairwise_figures([], [])
    with pytest.raises(ValueError, match="2 have the id 'a'"):
        outcomes([contest("a"), contest("a")], [])


def planted(num, *, win, bias, faults=0.0, seed=0, lengths=None):
    """Contests and the verdicts of a judge with a known chance to win and a known position bias.

    Where the judge does not look (with probability 2 * bias), it takes the first; else it says
    truly who is better, which is the first model with probability `win`.
    """
    draw = np.random.default_rng(seed)
    contests = [
        contest(
            f"c{i:04}",
            "长" * (lengths[i] if lengths is not None else 5),
            "短" * 6,
            group=f"g{i % 3}",
        )
        for i in range(num)
    ]
    truth = {one.id: bool(draw.random() < win) for one in contests}

    def reply(one, order):
        if draw.random() < faults:
            return "无法比较"
        if draw.random() < 2 * bias:
            return verdict(1.0)
        return verdict(1.0 if truth[one.id] == (order == (0, 1)) else 0.0)

    return contests, truth, judged(contests, reply)


def test_a_planted_judges_wins_and_position_bias_are_recovered():
    contests, truth, judgements = planted(1500, win=0.6, bias=0.15)
    found = pairwise_figures(contests, judgements)
    assert found.position_bias.low < 0.15 < found.position_bias.high
    assert found.position_bias.high - found.position_bias.low < 0.04
    # An order that is not looked at is a tie where the other one contradicts it.
    looks = 1 - 2 * 0.15
    assert found.overall.wins / 1500 == pytest.approx(
        np.mean(list(truth.values())) * looks, abs=0.05
    )
    share = found.overall.share
    expected = 0.5 + (np.mean(list(truth.values())) - 0.5) * looks
    assert share["low"] < expected < share["high"]
    assert len(found.groups) == 3


def test_a_fair_judge_shows_no_position_bias_and_faults_do_not_bend_it():
    contests, truth, judgements = planted(800, win=0.5, bias=0.0, faults=0.2, seed=3)
    found = pairwise_figures(contests, judgements)
    assert found.position_bias.value == 0.0 and found.orders_disagree == 0
    assert found.overall.failed == pytest.approx(800 * (1 - 0.8**2), abs=45)
    assert sum(found.unparsed.values()) == found.failures["unreadable"]
    known = {name: o for name, o in outcomes(contests, judgements).items() if o is not None}
    assert all((o == "win") == truth[name] for name, o in known.items())


def test_a_judge_that_likes_length_is_seen_by_it():
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 12, size=300)
    contests, _, _ = planted(300, win=0.5, bias=0.0, lengths=lengths)

    def longer(one, order):
        texts = [one.answered.answers[i] for i in order]
        if len(texts[0]) == len(texts[1]):
            return verdict(0.5)
        return verdict(float(len(texts[0]) > len(texts[1])))

    found = pairwise_figures(contests, judged(contests, longer))
    assert found.longer_share.value == 1.0
    assert found.longer_share.num_pairs == int((lengths != 6).sum())
    assert found.length_bias.value == 0.5 and found.length_balanced_share.value == 0.5


def test_a_better_model_that_writes_longer_is_told_from_a_judge_that_likes_length():
    draw = np.random.default_rng(5)
    count, win, bias = 4000, 0.7, 0.1
    lengths = np.where(draw.random(count) < 0.8, 11, 1)  # The other's have 6.
    contests, truth, _ = planted(count, win=win, bias=0.0, lengths=lengths)

    def judge(likes_length):
        taken = {one.id: draw.random() < 2 * likes_length for one in contests}

        def reply(one, order):
            wins = len(one.one) > len(one.other) if taken[one.id] else truth[one.id]
            return verdict(1.0 if wins == (order == (0, 1)) else 0.0)

        return pairwise_figures(contests, judged(contests, reply))

    fair, biased = judge(0.0), judge(bias)
    # The longer responses of a better model get more points from a fair judge, too.
    assert fair.longer_share.low > 0.55
    assert fair.length_bias.low < 0.0 < fair.length_bias.high
    assert fair.length_balanced_share.low < win < fair.length_balanced_share.high
    assert biased.length_bias.low < bias < biased.length_bias.high
    assert biased.length_bias.high - biased.length_bias.low < 0.06
    # Verdicts by length are a half for each where lengths are balanced; without that, 0.8.
    expected = 2 * bias * 0.5 + (1 - 2 * bias) * win
    balanced = biased.length_balanced_share
    assert balanced.low < expected < balanced.high
    unbalanced = 2 * bias * 0.8 + (1 - 2 * bias) * win
    share = biased.overall.share
    assert share["low"] < unbalanced < share["high"] and share["low"] > expected


def test_a_model_whose_responses_are_always_longer_leaves_the_bias_to_length_open():
    contests, _, judgements = planted(20, win=0.5, bias=0.0, lengths=np.full(20, 9))
    found = pairwise_figures(contests, judgements)
    assert found.length_bias is None and found.length_balanced_share is None
    assert found.longer_share is not None


def test_the_prompt_for_conversations_has_all_places_and_is_another_version():
    template = conversation_template()
    contests = [
        contest("a", "患者：疼\n医生：哪里疼？", "患者：疼\n医生：去医院", diagnosis="胃炎")
    ]
    found = next(ballots(contests, judge="j", settings={}, template=template))
    sent = found.messages[-1]["content"]
    assert "医生的诊断：胃炎" in sent and "哪里疼？" in sent and "{{" not in sent
    assert found.question.template == template.hash
    assert template.hash != next(ballots(contests, judge="j", settings={})).question.template


def test_kuake_qic_is_read_whole(shared_data):
    found = read_kuake_qic(shared_data / "5_gen_benchmark" / "huatuogpt_KUAKE-QIC_100.json")
    assert len(found) == 69 and len({one.intent for one in found}) == 10
    assert found[0].prompt.messages[0].role == "user"
    assert found[0].prompt.messages[0].content == found[0].question


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "s2", "label": "病情诊断"}, r"q\.json:.*: query is None; it should be text"),
        ({"id": "s2", "label": "", "query": "x"}, r"label is ''; it should be text"),
        ({"id": 3, "label": "x", "query": "x"}, r"id is 3; it should be text"),
        ({"id": "s1", "label": "x", "query": "x"}, r"the id 's1' is already used at .*q\.json:1"),
        ("s3", r"id is None; it should be text"),
    ],
)
def test_a_row_of_kuake_qic_that_does_not_fit_is_named(tmp_path, row, message):
    path = tmp_path / "q.json"
    path.write_text(json.dumps([{"id": "s1", "label": "病情诊断", "query": "头痛"}, row]))
    with pytest.raises(ValueError, match=message):
        read_kuake_qic(path)
