"""Rewards from a judge inside the loop: asked while responses are sampled, and never paid twice."""

import collections
import dataclasses
import hashlib
import json
import threading
import time

import pytest

from huatuo_jax.generation.engine import Engine
from huatuo_jax.judge.judgements import sha256
from huatuo_jax.ppo.trainer import Trainer
from huatuo_jax.training.metrics import read_rows
from tests.evaluation.scripted_server import Refuse, ScriptedServer
from tests.killing import Stage, assert_identical, kill
from tests.ppo.run_graded import (
    CONCURRENCY,
    NUM_ITERATIONS,
    graded_rewards,
    prompts,
    settings,
)
from tests.ppo.tiny import run_tiny

GRADED = Stage(
    module="tests.ppo.run_graded",
    name="ppo",
    num_steps=NUM_ITERATIONS,
    texts=("samples.jsonl",),
)


class Judge(ScriptedServer):
    """Takes its time, fails now and then, and replies in a wrong form now and then.

    What it replies is a function of the request; whether it fails is not.

    Attributes:
        answers: times that each request was answered.
    """

    def __init__(self, *, delay_s=0.01):
        super().__init__(self.respond)
        self.delay_s, self.answers, self.calls = delay_s, collections.Counter(), 0

    def respond(self, body, number):
        request = sha256(json.dumps(body, sort_keys=True))
        draw = int(hashlib.sha256(request.encode()).hexdigest(), 16)
        time.sleep(self.delay_s * (1 + draw % 4))
        with self.lock:
            self.calls += 1
            if self.calls % 5 == 0:
                raise Refuse(500, "the server had an error")
            self.answers[request] += 1
        if draw % 10 < 2 or "is like 3\n" in body["messages"][1]["content"]:
            return "It meets the first one."
        entries = [{"criterion": n, "criteria_met": bool(draw >> (4 + n) & 1)} for n in (1, 2)]
        return json.dumps({"verdicts": entries})


def start(workdir, judge):
    return GRADED.start(workdir, seconds_each=judge.url)


def finish(workdir, judge):
    process = start(workdir, judge)
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output


def replies(workdir):
    """Text of the reply to each question and attempt; each stands in the file once."""
    found = {}
    for row in read_rows(workdir / "ppo" / "graded" / "replies.jsonl"):
        key = row["question"], row["attempt"]
        assert key not in found
        found[key] = row["text"]
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    with Judge() as judge:
        finish(workdir, judge)
        assert set(judge.answers.values()) == {1}
    return workdir


def kill_at_requests(workdir, after, unbroken):
    """Kills runs, each after so many requests of its own; then runs to the end and compares."""
    with Judge() as judge:
        for number in after:
            seen = len(judge.requests)
            process = start(workdir, judge)
            while len(judge.requests) < seen + number:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.001)
            kill(process)
        finish(workdir, judge)
        paid_again = sum(count - 1 for count in judge.answers.values())
    assert_identical(GRADED.result(workdir), GRADED.result(unbroken))
    assert replies(workdir) == replies(unbroken)
    assert paid_again <= len(lost_calls(workdir)) <= CONCURRENCY * len(after)


def lost_calls(workdir):
    """Calls that were sent and have no end: kills took them away."""
    rows = read_rows(workdir / "ppo" / "graded" / "replies.jsonl.spending.jsonl")
    ended = {row["call"] for row in rows if "outcome" in row}
    return {row["call"] for row in rows} - ended


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_is_judged_ends_as_an_unbroken_one(unbroken, tmp_path):
    kill_at_requests(tmp_path, (9, 14), unbroken)


@pytest.mark.slow
def test_a_run_killed_at_ten_moments_of_its_judging_ends_as_an_unbroken_one(unbroken, tmp_path):
    kill_at_requests(tmp_path, (1, 3, 2, 7, 4, 5, 1, 8, 2, 6), unbroken)


def test_responses_are_judged_while_others_are_sampled(tmp_path, monkeypatch, on_one_device):
    """The engine does not go on before the judge was asked about all that is finished."""
    finished, waited = set(), threading.Event()
    plain = Engine.step

    def step(engine):
        if finished:
            until = time.monotonic() + 60
            while len(questions()) < len(finished):
                assert time.monotonic() < until, "the judge was not asked while others are sampled"
                time.sleep(0.001)
            waited.set()
        found = plain(engine)
        finished.update(one.request_index for one in found)
        return found

    def questions():
        return {sha256(json.dumps(one["messages"])) for one in judge.requests}

    monkeypatch.setattr(Engine, "step", step)
    with Judge() as judge:
        mix, rewards = graded_rewards(tmp_path, judge.url)
        cfg = settings(mix)
        rollout = dataclasses.replace(cfg.rollout, slots=1)
        cfg = dataclasses.replace(cfg, num_iterations=1, rollout=rollout)
        run_tiny(cfg, tmp_path, rewards=rewards, prompts=prompts())
    assert waited.is_set()
    (row,) = read_rows(tmp_path / "ppo" / "metrics.jsonl")
    assert row["ppo/judge/questions"] == 8 and "throughput/judging_s" in row


def test_log_probabilities_are_computed_while_the_judge_is_at_work(
    tmp_path, monkeypatch, on_one_device
):
    """The judge does not answer before they are there."""
    evaluated, plain = threading.Event(), Trainer._evaluated

    def evaluate(trainer, state, rollout):
        found = plain(trainer, state, rollout)
        evaluated.set()
        return found

    class Waiting(Judge):
        came = True

        def respond(self, body, number):
            self.came &= evaluated.wait(60)
            return super().respond(body, number)

    monkeypatch.setattr(Trainer, "_evaluated", evaluate)
    with Waiting() as judge:
        mix, rewards = graded_rewards(tmp_path, judge.url)
        cfg = dataclasses.replace(settings(mix), num_iterations=1)
        run_tiny(cfg, tmp_path, rewards=rewards, prompts=prompts())
    assert judge.came and judge.paid >= 8
