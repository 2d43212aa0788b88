"""Win rates, with judges whose verdicts are known."""

import dataclasses

import pytest

from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.evaluation.stage import judge_pairs, score_answers
from huatuo_jax.judge.judgements import JudgementFailed, Reply
from huatuo_jax.judge.offline import OfflineJudge, score_answer
from huatuo_jax.judge.questions import Answered, win_rates


@dataclasses.dataclass
class PlantedJudge:
    """Prefers the longer text, or (where `stubborn`) always the one shown first."""

    stubborn: bool = False

    async def compare(self, prompt, first, second):
        if self.stubborn:
            return Reply(p_first=0.9)
        return Reply(p_first=0.5 if len(first) == len(second) else float(len(first) > len(second)))


def answered(**texts):
    return [
        Answered(Prompt(id=name, messages=(Message("user", "咳嗽"),), source="test"), tuple(found))
        for name, found in texts.items()
    ]


def test_wins_ties_and_losses_are_counted_by_answer():
    one = answered(a=["long one", "x"], b=["yy", "yy"])
    other = answered(a=["short", "xx"], b=["zz", "z"])
    found = win_rates(judge_pairs(one, other, PlantedJudge()), seed=0)
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    # Of prompt a half the points, of prompt b three quarters.
    assert found["share"]["value"] == pytest.approx((0.5 + 0.75) / 2)
    assert found["wins_shown_first"] == found["wins_shown_second"] == 2
    assert found["orders_disagree"] == 0


def test_a_judge_that_prefers_a_place_gives_ties_and_is_told_of():
    one, other = answered(a=["p", "q"]), answered(a=["r", "s"])
    found = win_rates(judge_pairs(one, other, PlantedJudge(stubborn=True)), seed=0)
    assert (found["wins"], found["ties"], found["losses"]) == (0, 2, 0)
    assert found["orders_disagree"] == 2
    assert found["wins_shown_first"] == 2 and found["wins_shown_second"] == 0


class FailingJudge(PlantedJudge):
    """Has nothing to say where the second text shown is `bad`."""

    async def compare(self, prompt, first, second):
        if second == "bad":
            raise JudgementFailed("no verdict")
        return await super().compare(prompt, first, second)


def test_pairs_without_a_verdict_in_either_order_are_counted_and_in_no_share():
    one, other = answered(a=["long one", "bad", "x"]), answered(a=["bad", "y", "zz"])
    found = win_rates(judge_pairs(one, other, FailingJudge()), seed=0)
    assert found["failed"] == 2
    assert (found["wins"], found["ties"], found["losses"]) == (0, 0, 1)
    assert found["share"]["value"] == 0.0
    none = win_rates(judge_pairs(answered(a=["bad"]), answered(a=["x"]), FailingJudge()), seed=0)
    assert none["failed"] == 1 and none["share"] is None


def test_the_offline_judges_scores_are_passed_on_by_criterion():
    one = answered(a=["多喝水，注意休息。", "好"])
    found = score_answers(one, OfflineJudge())
    expected = [score_answer(one[0].prompt, text)["overall"] for text in one[0].answers]
    assert found["overall"]["a"] == expected
