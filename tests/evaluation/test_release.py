"""What is released, by tables of the judge's shares, and never what is not preferred to SFT."""

import itertools

import numpy as np
import pytest

from huatuo_jax.clinic import dialogues as clinic
from huatuo_jax.core.statistics import mean_over_prompts
from huatuo_jax.evaluation.release import CANDIDATES, COMPARED, LEAST_PROMPTS, decide, release
from huatuo_jax.judge.offline import TRUTHS, TruthJudge

EVEN = (0.5, 0.4, 0.6)
BETTER = (0.7, 0.6, 0.8)
WORSE = (0.3, 0.2, 0.4)
MUCH_BETTER = (0.9, 0.85, 0.95)


def share(value, low, high, num_prompts=40):
    return {"value": value, "low": low, "high": high, "num_prompts": num_prompts}


def table(*, failed=0, num_prompts=40, **told):
    """A share of each comparison; those that are not told are even."""
    names = [f"{one}_over_{other}" for one, other in COMPARED]
    assert set(told) <= set(names)
    return {
        name: {
            "share": None
            if name in told and told[name] is None
            else share(*(told[name] if name in told else EVEN), num_prompts),
            "failed": failed,
        }
        for name in names
    }


def decided(**told):
    return decide(table(**told), judge="a judge", num_prompts=40, best_of_n=4)


@pytest.mark.parametrize(
    ("told", "pick"),
    [
        ({}, "sft"),
        ({"sft_over_base": BETTER}, "sft"),
        ({"sft_over_base": WORSE}, "base"),
        # One of them beats SFT.
        ({"ppo_over_sft": BETTER}, "ppo"),
        ({"best_of_n_over_sft": BETTER}, "best_of_n"),
        ({"ppo_over_sft": WORSE, "best_of_n_over_sft": WORSE}, "sft"),
        ({"ppo_over_sft": (0.55, 0.5, 0.6)}, "sft"),
        # Both do: n times the inference has to be worth it.
        ({"ppo_over_sft": BETTER, "best_of_n_over_sft": MUCH_BETTER}, "ppo"),
        (
            {
                "ppo_over_sft": BETTER,
                "best_of_n_over_sft": MUCH_BETTER,
                "best_of_n_over_ppo": BETTER,
            },
            "best_of_n",
        ),
        (
            {
                "ppo_over_sft": MUCH_BETTER,
                "best_of_n_over_sft": MUCH_BETTER,
                "best_of_n_over_ppo": BETTER,
            },
            "best_of_n",
        ),
        (
            {
                "ppo_over_sft": MUCH_BETTER,
                "best_of_n_over_sft": BETTER,
                "best_of_n_over_ppo": BETTER,
            },
            "ppo",
        ),
        # Where base is the pick, a later model must be preferred to both.
        ({"sft_over_base": WORSE, "ppo_over_sft": BETTER}, "base"),
        ({"sft_over_base": WORSE, "ppo_over_base": BETTER}, "base"),
        ({"sft_over_base": WORSE, "ppo_over_sft": BETTER, "ppo_over_base": BETTER}, "ppo"),
        (
            {
                "sft_over_base": WORSE,
                "best_of_n_over_sft": BETTER,
                "best_of_n_over_base": BETTER,
                "ppo_over_sft": BETTER,
            },
            "best_of_n",
        ),
        # No verdict at all on a pair of models.
        ({"ppo_over_sft": None, "best_of_n_over_sft": None, "sft_over_base": None}, "sft"),
        (
            {
                "ppo_over_sft": BETTER,
                "best_of_n_over_sft": MUCH_BETTER,
                "best_of_n_over_ppo": None,
            },
            "ppo",
        ),
    ],
)
def test_the_rule_picks(told, pick):
    found = decided(**told)
    assert found.pick == pick
    name = {"base": "Base", "sft": "SFT", "ppo": "PPO", "best_of_n": "Best-of-4"}[pick]
    assert found.reason.startswith(f"{name} is released: asked about 40 held-out prompts, a judge")
    assert found.reason.endswith(".") and "\n" not in found.reason


def test_no_later_model_whose_interval_holds_a_half_is_released_over_sft():
    tables = itertools.product((WORSE, EVEN, BETTER, MUCH_BETTER), repeat=len(COMPARED))
    names = [f"{one}_over_{other}" for one, other in COMPARED]
    picks = set()
    for shares in tables:
        told = dict(zip(names, shares, strict=True))
        pick = decided(**told).pick
        picks.add(pick)
        if pick in ("ppo", "best_of_n"):
            assert told[f"{pick}_over_sft"][1] > 0.5
            assert told[f"{pick}_over_base"][1] > 0.5 or told["sft_over_base"] != WORSE
        if pick == "base":
            assert told["sft_over_base"][2] < 0.5
    assert picks == set(CANDIDATES)


def test_the_reason_holds_the_share_and_the_interval_that_decided():
    assert "prefers it to SFT (share 0.700, 95 % interval 0.600 to 0.800)." in (
        decided(ppo_over_sft=BETTER).reason
    )
    reason = decided().reason
    assert "neither PPO (share 0.500, 95 % interval 0.400 to 0.600) nor best-of-4 (share" in reason
    both = {"ppo_over_sft": BETTER, "best_of_n_over_sft": MUCH_BETTER}
    assert "best-of-4, which costs 4 times the inference, has share 0.900" in decided(**both).reason


def test_too_few_prompts_release_sft_and_say_so():
    everything = {f"{one}_over_{other}": (1.0, 1.0, 1.0) for one, other in COMPARED}
    found = decided(num_prompts=LEAST_PROMPTS - 1, **everything)
    assert found.pick == "sft"
    assert f"only {LEAST_PROMPTS - 1} prompts were judged, {LEAST_PROMPTS} are need" in found.reason
    assert decided(num_prompts=LEAST_PROMPTS, **everything).pick == "best_of_n"


def test_pairs_without_a_verdict_are_told_of():
    assert "(12 pairs had no verdict)." in decided(failed=2).reason
    assert "no verdict" not in decided().reason


def test_a_judge_without_a_preference_seldom_seems_to_have_one_on_the_fewest_prompts():
    draw = np.random.default_rng(0)
    found = [
        mean_over_prompts({f"p{i}": [float(value)] for i, value in enumerate(values)}, seed=seed)
        for seed, values in enumerate(draw.integers(0, 2, size=(800, LEAST_PROMPTS)))
    ]
    # 2.5 % are meant; the standard error of 800 such tries is .6 %.
    assert np.mean([one.low > 0.5 for one in found]) < 0.04


def figures(*, pick="ppo", **truths):
    """Figures of an evaluation in which one model is preferred, and truths differ by so much."""
    won = {f"{pick}_over_sft": BETTER} if pick in ("ppo", "best_of_n") else {}
    won |= {"sft_over_base": WORSE} if pick == "base" else {}
    fields = {f"truth_{name}": share(0.5, 0.4, 0.6) for name in TRUTHS}
    return {
        "num_prompts": 40,
        "judge": "clinic-truth-v1",
        "models": dict.fromkeys(CANDIDATES, fields),
        "differences": {
            f"{one}_over_{other}": {
                f"truth_{name}": share(*(truths[name] if name in truths else (0.0, -0.1, 0.1)))
                for name in TRUTHS
            }
            for one, other in COMPARED
        },
        "win_rates": table(**won),
    }


def test_the_truths_are_those_that_the_judge_tells():
    (prompt,) = clinic.prompts(1, seed=0)
    told = TruthJudge().truths(prompt, prompt.reference)
    assert tuple(told) == tuple(TRUTHS)


def test_truth_stands_beside_the_pick_and_a_loss_of_it_is_a_warning():
    found = release(figures(diagnosis_right=(-0.2, -0.3, -0.1)), best_of_n=4)
    assert found["pick"] == "ppo"
    assert found["truth"]["diagnosis_right"]["difference"]["value"] == -0.2
    assert found["truth"]["diagnosis_right"]["sft"]["value"] == 0.5
    assert found["warnings"] == [
        "Though the judge prefers PPO to SFT, PPO names the right disease less often: -0.200, "
        "95 % interval -0.300 to -0.100."
    ]


def test_more_of_a_fault_is_a_warning_and_more_of_what_is_good_is_none():
    found = release(figures(diagnosis_right=(0.2, 0.1, 0.3)), best_of_n=4)
    assert found["warnings"] == []
    found = release(figures(red_flag_missed=(0.2, 0.1, 0.3)), best_of_n=4)
    assert "PPO misses an emergency more often: +0.200" in found["warnings"][0]
    found = release(figures(diagnosis_right=(-0.2, -0.4, 0.0)), best_of_n=4)
    assert found["warnings"] == []


def test_where_base_is_the_pick_the_difference_is_turned_round():
    found = release(figures(pick="base", diagnosis_right=(0.2, 0.1, 0.3)), best_of_n=4)
    assert found["pick"] == "base"
    difference = found["truth"]["diagnosis_right"]["difference"]
    assert (difference["value"], difference["low"], difference["high"]) == (-0.2, -0.3, -0.1)
    assert "base names the right disease less often" in found["warnings"][0]


def test_a_judge_without_truth_gives_none_and_all_comparisons_are_kept():
    given = figures(pick="best_of_n")
    given["models"] = dict.fromkeys(CANDIDATES, {})
    found = release(given, best_of_n=4)
    assert found["truth"] is None and found["warnings"] == []
    assert found["pick"] == "best_of_n" and found["num_prompts"] == 40
    assert list(found["comparisons"]) == [f"{one}_over_{other}" for one, other in COMPARED]
    assert found["comparisons"]["best_of_n_over_sft"] == {
        "share": share(*BETTER),
        "failed": 0,
        "preferred": "best_of_n",
    }
    assert found["comparisons"]["ppo_over_sft"]["preferred"] == "neither"
    assert found["best_of_n"]["n"] == 4
