"""Judgings while PPO trains: what is kept, when the run stops, and what a kill takes."""

import dataclasses
import json
import os
import shutil
import signal
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from huatuo_jax.clinic import dialogues as clinic
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.judge.judgements import read_judgements
from huatuo_jax.ppo.held_out import OUTCOME_FILE, HeldOutJudging
from huatuo_jax.ppo.judging import Judged, JudgingConfig, has_turned, is_due, kept_of, outcome
from huatuo_jax.preferences import label
from huatuo_jax.training.loop import Interrupted, train
from huatuo_jax.training.metrics import is_time_field, read_rows
from tests.ppo.planted_judge import PlantedJudge, goes_past_the_optimum
from tests.ppo.tiny import Table, config, run_tiny, tiny_job


def judged_config(*, judging=None, **changed):
    """A run whose reward rises all the time, and leaves what the judge wants behind it."""
    settings = {
        "num_iterations": 14,
        "kl_coef": 0.0,
        "rollout": {"num_prompts": 32},
        "optimizer": {"learning_rate": 4e-3, "decay": "constant"},
        "loop": {"keep_checkpoints": 20, "checkpoint_every": 5},
    }
    judging = {"every": 2, "num_samples": 4, "patience": 2} | (judging or {})
    section = JudgingConfig(judge=JudgeConfig(), prompts="none", **judging)
    return config(**(settings | changed), judging=section)


@pytest.fixture
def judge(monkeypatch):
    planted = PlantedJudge()
    monkeypatch.setattr(label, "open_judge", lambda cfg: planted)
    return planted


def rows_of(workdir):
    """The rows of metrics without those fields that depend on the clock."""
    return [
        {name: value for name, value in row.items() if not is_time_field(name)}
        for row in read_rows(workdir / "ppo" / "metrics.jsonl")
    ]


def judged_rows(workdir):
    return {row["step"]: row for row in rows_of(workdir) if "judged/share" in row}


def run(cfg, workdir, **options):
    job = tiny_job(cfg, workdir, scorer=options.pop("scorer", goes_past_the_optimum()), **options)
    train(job, cfg.loop)
    return job.judging.result()


def kept_arrays(workdir):
    with np.load(workdir / "ppo" / "kept.npz") as found:
        return dict(found)


def assert_kept(workdir, iteration):
    """That the kept policy is, bit for bit, that of an iteration's checkpoint."""
    place = workdir / "ppo" / "checkpoints" / str(iteration) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        trained = checkpointer.restore(place)["policy"]["trained"]
    expected = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(trained)
    }
    kept = kept_arrays(workdir)
    assert kept.keys() == expected.keys()
    assert all(kept[path].tobytes() == expected[path].tobytes() for path in expected)


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    """A run that the judge ended: its folder, its result and all that was asked."""
    workdir = tmp_path_factory.mktemp("turned")
    planted = PlantedJudge()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label, "open_judge", lambda cfg: planted)
        result = run(judged_config(), workdir)
    return workdir, result, planted.asked


def test_the_policy_that_the_judge_prefers_is_kept_and_the_run_ends_where_it_turns(turned):
    workdir, result, _ = turned
    rows = judged_rows(workdir)
    shares = {step: row["judged/share"] for step, row in rows.items()}
    best = max(shares, key=lambda step: shares[step])
    last = max(shares)
    assert 0 < best < last < 14 and shares[best] > 0.55
    assert result["kept_iteration"] == best and not result["best_is_initial"]
    assert result["kept_share"] == shares[best]
    assert [step for step in shares if step > best] == [best + 2, best + 4] == [last - 2, last]
    rewards = {step: row["judged/reward"] for step, row in rows.items()}
    assert result["ended"] == (
        f"the judge turned at iteration {last} while the reward rose from {rewards[best]:.3f} to "
        f"{rewards[last]:.3f}"
    )
    assert_kept(workdir, best)
    assert rows_of(workdir)[-1]["step"] == last  # Nothing was trained after that.


def test_reward_length_and_kl_are_those_of_the_judged_answers(turned):
    workdir, _, _ = turned
    rows = judged_rows(workdir)
    scores = goes_past_the_optimum().rewards
    for step, row in rows.items():
        path = workdir / "ppo" / "judged" / str(step) / "answers.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(records) == 64 and len({record["id"] for record in records}) == 64
        ids = [tuple(record["answers"][-1]["token_ids"]) for record in records]
        assert row["judged/reward"] == pytest.approx(np.mean([scores[one] for one in ids]))
        assert row["judged/length"] == pytest.approx(np.mean([len(one) for one in ids]))
    assert rows[0]["judged/share"] == 0.5 and rows[0]["judged/kl_per_sequence"] == 0.0
    divergences = [row["judged/kl_per_sequence"] for row in rows.values()]
    assert divergences == sorted(divergences) and divergences[-1] > 0.5


def test_the_share_is_that_of_the_verdicts(turned):
    """By hand, from the answers and the judge's own rule."""
    workdir, _, _ = turned
    worth = PlantedJudge().worth
    for step, row in judged_rows(workdir).items():
        if not step:
            continue
        path = workdir / "ppo" / "judged" / str(step) / "answers.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        points = []
        for record in records:
            initial, new = (worth(one["text"]) for one in record["answers"])
            points.append(0.5 if initial == new else float(new > initial))
        assert row["judged/share"] == pytest.approx(np.mean(points))
        assert row["judged/pairs"] == 64 and row["judged/failed"] == 0
        assert row["judged/share_low"] <= row["judged/share"] <= row["judged/share_high"]


def test_no_equal_question_is_asked_twice_nor_any_about_equal_answers(turned):
    _, _, asked = turned
    assert len(asked) == len(set(asked)) > 50
    assert all(first != second for _, first, second in asked)


class FallsWhereJudged(Table):
    """A reward that rises for training and falls on the held-out answers."""

    def scores(self, answers):
        return super().scores(answers) * (-1 if len(answers) == 64 else 1)


@pytest.mark.slow
def test_a_run_whose_reward_falls_with_the_judge_goes_on_to_its_end(judge, tmp_path):
    scorer = FallsWhereJudged(goes_past_the_optimum().rewards)
    result = run(judged_config(), tmp_path, scorer=scorer)
    rows = judged_rows(tmp_path)
    assert list(rows) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert result["ended"] == "all iterations"
    best = max(rows, key=lambda step: rows[step]["judged/share"])
    assert result["kept_iteration"] == best < 12
    assert_kept(tmp_path, best)


@pytest.mark.slow
def test_a_policy_that_the_judge_never_prefers_is_kept_and_said_to_be_worse(judge, tmp_path):
    judge.worth = lambda text: -text.split().count("3")
    cfg = judged_config(num_iterations=3, judging={"patience": None})
    result = run(cfg, tmp_path)
    rows = judged_rows(tmp_path)
    assert list(rows) == [0, 2, 3]  # The last one, too.
    assert result["best_is_initial"] and result["kept_share"] < 0.5
    assert_kept(tmp_path, result["kept_iteration"])


def test_a_run_killed_while_judging_goes_on_and_asks_nothing_twice(turned, monkeypatch, tmp_path):
    """The judge dies in the middle of a judging, and once more right after one."""
    workdir, result, asked = turned

    class Dying(PlantedJudge):
        num_left = len(asked) // 2

        async def compare(self, prompt, first, second):
            if not self.num_left:
                raise KeyboardInterrupt
            self.num_left -= 1
            return await super().compare(prompt, first, second)

    dying, living = Dying(), PlantedJudge()
    monkeypatch.setattr(label, "open_judge", lambda cfg: dying)
    with pytest.raises(KeyboardInterrupt):
        run(judged_config(), tmp_path)
    monkeypatch.setattr(label, "open_judge", lambda cfg: living)
    assert run(judged_config(), tmp_path) == result
    found = [*dying.asked, *living.asked]
    assert living.asked and sorted(found) == sorted(asked)
    assert rows_of(tmp_path) == rows_of(workdir)
    assert kept_arrays(tmp_path).keys() == kept_arrays(workdir).keys()
    for path, array in kept_arrays(workdir).items():
        assert kept_arrays(tmp_path)[path].tobytes() == array.tobytes()
    # Killed after a judging, before the next checkpoint: back to the checkpoint that it was of.
    checkpoints = tmp_path / "ppo" / "checkpoints"
    last = max(judged_rows(workdir))
    assert max(int(path.name) for path in checkpoints.iterdir()) == last
    living.asked.clear()
    assert run(judged_config(), tmp_path) == result
    assert not living.asked and rows_of(tmp_path) == rows_of(workdir)


def test_a_run_told_to_stop_while_judging_waits_for_its_calls_and_asks_no_more(
    turned, monkeypatch, tmp_path
):
    workdir, result, asked = turned

    class Stopped(PlantedJudge):
        async def compare(self, prompt, first, second):
            if len(self.asked) == len(asked) // 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return await super().compare(prompt, first, second)

    stopped, later = Stopped(), PlantedJudge()
    monkeypatch.setattr(label, "open_judge", lambda cfg: stopped)
    with pytest.raises(Interrupted, match=r"stopped with \d+ of \d+ judgements to ask for"):
        run(judged_config(), tmp_path)
    assert len(stopped.asked) <= len(asked) // 2 + JudgingConfig(prompts="none").concurrency
    monkeypatch.setattr(label, "open_judge", lambda cfg: later)
    assert run(judged_config(), tmp_path) == result
    assert sorted([*stopped.asked, *later.asked]) == sorted(asked)
    assert rows_of(tmp_path) == rows_of(workdir)


def test_a_run_that_begins_anew_asks_again_about_no_text_that_has_a_verdict(
    turned, judge, tmp_path
):
    workdir, result, _ = turned
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "ppo" / "checkpoints")
    assert run(judged_config(), tmp_path / "run") == result
    assert not judge.asked and rows_of(tmp_path / "run") == rows_of(workdir)


def test_pairs_without_a_verdict_are_counted_and_end_nothing(judge, tmp_path):
    judge.fails = lambda prompt: prompt.id.startswith("h1 ")
    cfg = judged_config(num_iterations=2)
    run(cfg, tmp_path)
    row = judged_rows(tmp_path)[2]
    assert 1 <= row["judged/failed"] <= 4
    assert row["judged/failed"] + row["judged/pairs"] == 64


def test_a_judge_that_fails_on_all_is_one_clear_line_and_is_asked_again(judge, tmp_path):
    judge.fails = lambda prompt: True
    cfg = judged_config(num_iterations=2)
    with pytest.raises(ValueError, match=r"no judgement succeeded: all \d+ failed, .*no verdict"):
        run(cfg, tmp_path)
    judge.fails = lambda prompt: False
    assert run(cfg, tmp_path)["kept_iteration"] == 2


@pytest.mark.slow
def test_equal_answers_tie_and_nobody_is_asked(judge, tmp_path):
    cfg = judged_config(num_iterations=2, rollout={"temperature": 1e-3})
    result = run(cfg, tmp_path, scorer=Table(dict.fromkeys(goes_past_the_optimum().rewards, 1.0)))
    assert result["kept_share"] == 0.5 and not judge.asked
    assert result["best_is_initial"]  # It was there first.
    assert not (tmp_path / "ppo" / "judged" / "labels.jsonl").exists()


def test_iterations_of_the_critic_alone_are_not_judged(judge, tmp_path):
    cfg = judged_config(num_iterations=3, judging={"every": 1}, value={"warmup_iterations": 2})
    run(cfg, tmp_path)
    assert list(judged_rows(tmp_path)) == [0, 3]


def test_judging_does_not_change_what_is_trained(judge, tmp_path):
    cfg = judged_config(num_iterations=4)
    run(cfg, tmp_path / "judged")
    plain = dataclasses.replace(cfg, judging=None)
    run_tiny(plain, tmp_path / "plain", scorer=goes_past_the_optimum())
    without = [row for row in rows_of(tmp_path / "judged") if "judged/share" not in row]
    assert without == rows_of(tmp_path / "plain")


def test_a_labels_file_holds_the_verdicts_of_all_judgings(turned):
    workdir, _, asked = turned
    found = list(read_judgements(workdir / "ppo" / "judged" / "labels.jsonl"))
    assert len(found) >= len(asked) and all(one.p_first is not None for one in found)


def history(*points):
    """Judgings of these shares and rewards, the initial policy's first."""
    return [
        Judged(
            iteration=2 * index,
            share=share,
            share_low=share,
            share_high=share,
            reward=reward,
            kl_per_sequence=0.0,
            length=1.0,
            pairs=4,
            failed=0,
            cost=0.0,
        )
        for index, (share, reward) in enumerate(points)
    ]


TURNS = {
    "turned": ([(0.5, 0.0), (0.7, 1.0), (0.6, 1.5), (0.6, 1.2)], 2, True),
    "one below is not two": ([(0.5, 0.0), (0.7, 1.0), (0.6, 1.5)], 2, False),
    "one below is enough for a patience of one": ([(0.5, 0.0), (0.7, 1.0), (0.6, 1.5)], 1, True),
    "both fall": ([(0.5, 0.0), (0.7, 1.0), (0.6, 1.5), (0.6, 0.9)], 2, False),
    "the reward stands": ([(0.5, 0.0), (0.7, 1.0), (0.6, 1.5), (0.6, 1.0)], 2, False),
    "as good as the best again": ([(0.5, 0.0), (0.7, 1.0), (0.7, 1.5), (0.6, 1.6)], 2, False),
    "never above the initial policy": ([(0.5, 0.0), (0.4, 1.0), (0.45, 2.0)], 2, True),
    "no patience, no stop": ([(0.5, 0.0), (0.4, 1.0), (0.4, 2.0), (0.1, 3.0)], None, False),
    "the beginning": ([(0.5, 0.0)], 1, False),
}


@pytest.mark.parametrize(("points", "patience", "expected"), TURNS.values(), ids=TURNS.keys())
def test_the_run_ends_where_the_judge_turns_and_the_reward_rises(points, patience, expected):
    assert has_turned(history(*points), patience=patience) is expected


@pytest.mark.parametrize(("num_iterations", "early"), [(8, True), (6, False)])
def test_a_judge_that_turns_at_the_last_iteration_ends_nothing_early(
    tmp_path, num_iterations, early
):
    judgings = HeldOutJudging(
        cfg=judged_config(num_iterations=num_iterations),
        folder=tmp_path,
        tasks=(),
        server=None,
        make_record=None,
        normalization=None,
        transformer=None,
        keep=lambda variables: None,
    )
    for one in history(*TURNS["turned"][0]):  # As judged before a kill.
        place = tmp_path / str(one.iteration) / OUTCOME_FILE
        place.parent.mkdir()
        place.write_text(json.dumps(dataclasses.asdict(one)))
        policy = types.SimpleNamespace(variables=None)
        judgings.judge(types.SimpleNamespace(iteration=one.iteration, policy=policy), None)
    assert judgings.turned is early
    assert judgings.result()["ended"].startswith("the judge turned at iteration 6") is early
    assert early or judgings.result()["ended"] == "all iterations"


def test_of_equal_shares_the_earlier_policy_is_kept():
    found = history((0.5, 0.0), (0.4, 0.0), (0.45, 0.0), (0.45, 0.0))
    assert kept_of(found).iteration == 4
    assert outcome(found, turned=False)["best_is_initial"] is True
    assert kept_of(found[:1]) is None


def test_the_last_iteration_is_always_judged():
    due = [step for step in range(9) if is_due(3, step, warmup=3, last=8)]
    assert due == [0, 6, 8]


@pytest.mark.parametrize(
    ("field", "value"),
    [("every", 0), ("patience", 0), ("num_prompts", 0), ("num_samples", -1), ("concurrency", 0)],
)
def test_a_number_below_1_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value} must be at least 1$"):
        JudgingConfig(**{field: value})


def test_a_temperature_of_0_is_refused():
    with pytest.raises(ValueError, match=r"^temperature=0.0 must be above 0$"):
        JudgingConfig(temperature=0.0)


@pytest.mark.parametrize("judge_of", ["clinic", pytest.param("rubric", marks=pytest.mark.slow)])
def test_the_offline_judge_of_a_run_of_ppo_alone_is_that_of_its_prompts(
    tmp_path, monkeypatch, judge_of
):
    """One prompt that the clinic does not know is enough for the rubric."""
    asked = []
    monkeypatch.setattr(
        label, "open_judge", lambda cfg: asked.append(cfg.offline) or PlantedJudge()
    )
    cfg = judged_config(num_iterations=2, judging={"num_samples": 1})
    assert cfg.judging.judge.offline == "auto"
    job = tiny_job(cfg, tmp_path, scorer=goes_past_the_optimum())
    tasks = [
        dataclasses.replace(task, prompt=prompt)
        for task, prompt in zip(job.judging.tasks, clinic.prompts(16, seed=0), strict=True)
    ]
    if judge_of == "rubric":
        tasks[-1] = job.judging.tasks[-1]
    job.judging.tasks = tasks
    train(job, cfg.loop)
    assert asked == [judge_of]
