"""The command against a server that answers, fails, refuses, and outlives its labeller."""

import collections
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from huatuo_jax.data.readers import read_comparisons
from huatuo_jax.judge.judgements import CRITERIA, current, read_judgements
from huatuo_jax.judge.labelling import LabelConfig
from huatuo_jax.judge.openai import OpenAIJudgeConfig
from huatuo_jax.judge.server import ServerConfig
from huatuo_jax.judge.spending import BudgetConfig, SpendingFile
from huatuo_jax.preferences.from_judgements import ComparisonConfig, MixedFile
from huatuo_jax.preferences.label import LabelRun, report_path, run_labels, spending_path
from huatuo_jax.training.loop import Interrupted
from tests.called import call
from tests.evaluation.scripted_server import ScriptedServer
from tests.judge import planted_server as planted
from tests.judge import run_labeller
from tests.judge.planted_answers import make_answers
from tests.judge.planted_server import KEY, MODEL, Planted, PlantedServer

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT)}
INPUT_PRICE, OUTPUT_PRICE = 0.002, 0.008


def command(*flags, key=None, **named):
    flags = [*flags, *(f"--{name}={value}" for name, value in named.items())]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OPENAI_API_KEY", raising=False)
        if key is not None:
            patch.setenv("OPENAI_API_KEY", key)
        return call("label", *flags)


@pytest.fixture
def prices(tmp_path):
    path = tmp_path / "prices.json"
    price = {"input": INPUT_PRICE, "output": OUTPUT_PRICE}
    table = {"currency": "CNY", "per_tokens": 1, "models": {MODEL: price}}
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def cost_of(calls):
    return sum(c.input_tokens * INPUT_PRICE + c.output_tokens * OUTPUT_PRICE for c in calls)


def expected_of(what, judgement, texts):
    """What the server says about a judgement's texts."""
    shown = [texts[judgement.id][index] for index in judgement.answers]
    if judgement.protocol == "score":
        return planted.scores(what, *shown)
    return float(planted.verdict(what, *shown) == 1)


def label_through_failures(tmp_path, prices, monkeypatch, *, num_prompts, protocol, kills):
    """Labels against a server that fails in 30 % of the calls, killed at even distances."""
    answers, output = tmp_path / "answers.jsonl", tmp_path / "out" / "labels.jsonl"
    utilities = make_answers(
        answers, num_prompts=num_prompts, num_answers=4, utility=lambda p, a: (p + a) % 5 - 2.0
    )
    what = Planted(
        utilities=utilities, fault=planted.some_fault(0.3, seed=kills), time_out_s=7.0, delay_s=0.05
    )
    num_questions = num_prompts * {"score": 4, "both": 4 + 12}[protocol]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    told = []
    with PlantedServer(what) as server:
        arguments = [server.url, str(answers), str(output), str(prices), protocol]
        script = str(ROOT / "tests" / "judge" / "run_labeller.py")
        for kill in range(1, kills + 1):
            process = subprocess.Popen(
                [sys.executable, script, *arguments],
                env=ENVIRONMENT | {"OPENAI_API_KEY": KEY},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            enough = kill * num_questions // (kills + 2)
            deadline_s = time.monotonic() + 300
            while len(server.calls) < enough and process.poll() is None:
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            assert process.poll() is None, process.communicate()[0]
            process.send_signal(signal.SIGKILL)
            told.append(process.communicate()[0])
        for _ in range(12):
            labels = run_labeller.run(*arguments, say=told.append)
            if not labels.failed:
                break
        time.sleep(0.2)
        calls = list(server.calls)
    texts = {
        row["id"]: [answer["text"] for answer in row["answers"]]
        for row in map(json.loads, answers.read_text(encoding="utf-8").splitlines())
    }
    return what, calls, labels, output, texts, told, num_questions


def check_failures(tmp_path, prices, monkeypatch, *, num_prompts, protocol, kills):
    what, calls, labels, output, texts, told, num_questions = label_through_failures(
        tmp_path, prices, monkeypatch, num_prompts=num_prompts, protocol=protocol, kills=kills
    )
    # Every judgement is there exactly once, and none is wrong.
    lines = list(read_judgements(output))
    verdicts = [judgement for judgement in lines if not judgement.failed]
    counts = collections.Counter(judgement.identity for judgement in verdicts)
    assert len(counts) == num_questions == len(labels.judgements) and set(counts.values()) == {1}
    assert current(lines) == labels.judgements and labels.failed == 0
    for judgement in verdicts:
        found = judgement.scores if judgement.protocol == "score" else judgement.p_first
        assert found == expected_of(what, judgement, texts)
    assert len(lines) > len(verdicts)  # Some failed first, and say why.
    # Costs are the server's, but for calls of which nobody heard the end.
    spending = SpendingFile(spending_path(output))
    totals = spending.totals()
    spending.close()
    billed, delivered = planted.billed(calls), planted.delivered(calls)
    undelivered = len(billed) - len(delivered)
    most_lost = kills * run_labeller.CONCURRENCY
    assert len(calls) <= totals.requests <= len(calls) + most_lost
    assert undelivered <= totals.unknown_requests <= undelivered + most_lost
    assert totals.cost <= cost_of(delivered) + 1e-6
    assert totals.cost + totals.unknown_cost >= cost_of(billed) - 1e-6
    if not kills:
        assert totals.cost == pytest.approx(cost_of(delivered), abs=1e-6)
        assert totals.usage.input_tokens == sum(call.input_tokens for call in delivered)
        assert totals.usage.output_tokens == sum(call.output_tokens for call in delivered)
        assert sum(line.cost for line in lines) == pytest.approx(totals.cost, abs=1e-6)
    # The limits were kept, over all runs.
    limits = run_labeller.LIMITS
    assert planted.most_in_a_window(calls, limits.window_s) <= limits.requests
    # About 30 % failed, and in every way.
    outcomes = collections.Counter(call.outcome for call in calls)
    assert 0.2 < 1 - outcomes["ok"] / len(calls) < 0.4
    if len(calls) > 300:
        assert set(planted.FAULTS) <= set(outcomes)
    for path in output.parent.iterdir():
        assert KEY not in path.read_text(encoding="utf-8"), path
    assert KEY not in "".join(told)


def test_a_failing_server_is_paid_exactly_what_it_counts(tmp_path, prices, monkeypatch):
    check_failures(tmp_path, prices, monkeypatch, num_prompts=14, protocol="score", kills=0)


@pytest.mark.slow
def test_a_killed_labeller_goes_on(tmp_path, prices, monkeypatch):
    check_failures(tmp_path, prices, monkeypatch, num_prompts=14, protocol="score", kills=1)


@pytest.mark.slow
def test_a_labeller_killed_five_times_against_a_failing_server(tmp_path, prices, monkeypatch):
    check_failures(tmp_path, prices, monkeypatch, num_prompts=30, protocol="both", kills=5)


@pytest.fixture
def answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    utilities = make_answers(path, num_prompts=3, num_answers=3, utility=lambda p, a: a - 1.0)
    return path, utilities


def run_of(answers, output, prices, server, /, **changed):
    """The run that a command's flags would name."""
    fields = {"model": MODEL, "prices": str(prices)}
    budget = {name: changed.pop(name) for name in ("max_requests", "max_cost") if name in changed}
    run = {"answers": str(answers), "output": str(output)}
    run |= {name: changed.pop(name) for name in ("answers",) if name in changed}
    config = ServerConfig(base_url=server.url, budget=BudgetConfig(**budget))
    return LabelRun(**run, openai=OpenAIJudgeConfig(**(fields | changed), server=config))


@pytest.mark.parametrize(
    ("key", "changed", "why"),
    [
        (None, {}, "OPENAI_API_KEY is not set"),
        ("  ", {}, "OPENAI_API_KEY is not set"),
        ("two words", {}, "OPENAI_API_KEY holds characters that no key has"),
        ("sk-wrong-fedcba9876543210", {}, "refuses the key in OPENAI_API_KEY \\(HTTP 401"),
        (KEY, {"model": "unheard-of"}, "does not know the model 'unheard-of'"),
        (KEY, {"max_requests": 0}, "max_requests=0 is spent"),
        (KEY, {"max_cost": 0.0}, "max_cost=0 does not allow the next call"),
        (KEY, {"max_cost": 1.0, "model": "unpriced"}, "max_cost=1 needs a price"),
        (KEY, {"score_template": "none.txt"}, "there is no file none.txt"),
        (KEY, {"answers": "none.jsonl"}, "none.jsonl: no such file"),
    ],
)
def test_what_cannot_work_ends_in_one_line_and_leaves_nothing(
    answers, prices, tmp_path, monkeypatch, capfd, key, changed, why
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    output, told = tmp_path / "out" / "labels.jsonl", []
    with PlantedServer(Planted(utilities=answers[1])) as server:
        with pytest.raises(ValueError, match=why) as error:
            run_labels(run_of(answers[0], output, prices, server, **changed), told.append)
        assert len(server.calls) <= 8
    assert not output.parent.exists() or not any(output.parent.iterdir())
    everything = "".join([str(error.value), *told, *capfd.readouterr()])
    assert all(part not in everything for part in (KEY, "sk-", "3210"))
    assert "\n" not in str(error.value)


def test_a_command_with_a_wrong_key_ends_in_one_line(answers, prices, tmp_path):
    output = tmp_path / "out" / "labels.jsonl"
    with PlantedServer(Planted(utilities=answers[1])) as server:
        done = command(
            key="sk-wrong-fedcba9876543210",
            output=output,
            judge=MODEL,
            answers=answers[0],
            prices=prices,
            base_url=server.url,
        )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ") and "refuses the key in OPENAI_API_KEY" in line
    assert "sk-" not in done.stdout + done.stderr and "3210" not in done.stdout + done.stderr
    assert not any(output.parent.glob("*"))


@pytest.mark.parametrize("num_good", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_exit_code_says_whether_anything_was_judged(answers, prices, tmp_path, num_good):
    output = tmp_path / "out" / "labels.jsonl"
    what = Planted(utilities=answers[1], fault=lambda n: None if n < num_good else "prose")
    with PlantedServer(what) as server:
        done = command(key=KEY, output=output, judge=MODEL, answers=answers[0], base_url=server.url)
    assert done.returncode == (0 if num_good else 1)
    assert f"{num_good} verdicts, {9 - num_good} failed judgements, 0 not asked" in done.stdout
    assert ("no judgement succeeded: all 9 failed" in done.stderr) == (not num_good)
    assert "Traceback" not in done.stderr and len(list(read_judgements(output))) == 9


def test_a_dry_run_counts_and_sends_nothing_and_needs_no_key(
    answers, prices, tmp_path, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    told = []
    with PlantedServer(Planted(utilities=answers[1])) as server:
        cfg = run_of(answers[0], tmp_path / "labels.jsonl", prices, server)
        cfg = dataclasses.replace(cfg, label=LabelConfig(protocol="both"), dry_run=True)
        assert run_labels(cfg, told.append) is None
        assert not server.calls
    text = "\n".join(told)
    assert "27 judgements: 0 done" in text and "calls: 27" in text and "cost: about" in text
    assert f"from your table {prices}" in text and "nothing was sent or written" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "prices.json"]


def test_labels_become_comparisons_and_a_report(answers, prices, tmp_path):
    what = Planted(utilities=answers[1], noise=False)
    output, comparisons = tmp_path / "labels.jsonl", tmp_path / "comparisons.jsonl"
    with PlantedServer(what) as server:
        done = command(
            answers=answers[0],
            output=output,
            judge=MODEL,
            base_url=server.url,
            prices=prices,
            protocol="pairwise",
            comparisons=comparisons,
            key=KEY,
        )
        assert done.returncode == 0, done.stderr
        assert len(server.calls) == 18
    rows = [json.loads(line) for line in comparisons.read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows) and len(rows) == 9
    for row in rows:
        assert row["p_chosen"] == 1.0
        assert what.utilities[row["chosen"]] > what.utilities[row["rejected"]]
    report = json.loads(pathlib.Path(report_path(output)).read_text(encoding="utf-8"))
    assert report["spending"]["requests"] == 18
    assert report["spending"]["cost"] == pytest.approx(cost_of(server.calls), abs=1e-6)
    assert report["prices"]["table"] == str(prices) and not report["prices"]["is_example"]
    assert "spent in all runs: 18 requests" in done.stdout and "CNY" in done.stdout
    assert "next: huatuo train --config=reward:" in done.stdout


def test_only_the_command_names_a_next_command(answers, tmp_path):
    told, output = [], tmp_path / "labels.jsonl"
    run_labels(LabelRun(answers=str(answers[0]), output=str(output)), told.append)
    assert "next:" not in "".join(told)
    done = command(answers=answers[0], output=output)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("next: ")]
    assert line == "next: the same command with --comparisons=FILE; nothing is asked twice"


def test_the_offline_judge_needs_no_key_and_is_named_in_every_line(answers, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    output, told = tmp_path / "labels.jsonl", []
    run_labels(LabelRun(answers=str(answers[0]), output=str(output)), told.append)
    assert {judgement.judge for judgement in read_judgements(output)} == {"offline-rubric-v1"}
    assert "no substitute for a judge" in "".join(told)
    assert not pathlib.Path(spending_path(output)).exists()


def test_a_dry_run_says_where_the_budget_will_end(answers, prices, tmp_path):
    told = []
    with PlantedServer(Planted(utilities=answers[1])) as server:
        cfg = run_of(answers[0], tmp_path / "l.jsonl", prices, server, max_requests=2, max_cost=0.0)
        run_labels(dataclasses.replace(cfg, dry_run=True), told.append)
    text = "\n".join(told)
    assert "max_requests=2 leaves 2 of 9 calls" in text and "max_cost=0 leaves 0 of" in text


def bare(path, answers_of_each):
    """Answers without reference and diagnosis."""
    rows = [
        {
            "id": f"p{index}",
            "messages": [{"role": "user", "content": f"疼{index}天"}],
            "source": "x",
            "answers": [{"text": text} for text in answers_of_each],
        }
        for index in range(2)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def test_the_offline_judge_says_where_it_measures_form_alone(tmp_path):
    told = []
    cfg = LabelRun(answers=bare(tmp_path / "a.jsonl", ["好", "去看看"]), output="l", dry_run=True)
    run_labels(cfg, told.append)
    assert "2 of 2 prompts have neither reference nor diagnosis" in "\n".join(told)


def test_nothing_to_judge_or_to_compare_is_an_error_and_no_empty_file(tmp_path):
    output, comparisons = tmp_path / "l.jsonl", tmp_path / "c.jsonl"
    for texts, why in (([], "nothing to judge"), (["好"], "these judgements give no comparison")):
        cfg = LabelRun(
            answers=bare(tmp_path / "a.jsonl", texts),
            output=str(output),
            comparisons=str(comparisons),
        )
        with pytest.raises(ValueError, match=why):
            run_labels(cfg, print)
        assert not comparisons.exists() and output.exists() == bool(texts)


def test_a_file_to_mix_in_that_is_not_there_is_found_before_anything_is_asked(answers, tmp_path):
    output = tmp_path / "l.jsonl"
    cfg = LabelRun(
        answers=str(answers[0]),
        output=str(output),
        comparisons=str(tmp_path / "c.jsonl"),
        comparison=ComparisonConfig(mix=(MixedFile(path=str(tmp_path / "none.jsonl")),)),
    )
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        run_labels(cfg, print)
    assert not output.exists()


def test_help_shows_the_flags_and_one_that_would_do_nothing_is_refused(answers, tmp_path):
    assert "--max_cost" in command("--help").stdout
    for flag, why in (("max_cost=1", "by judge=offline"), ("ties=half", "by labels alone")):
        done = command(f"--{flag}", answers=answers[0], output=tmp_path / "l.jsonl")
        assert done.returncode == 1 and why in done.stderr and done.stderr.count("error:") == 1


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"output": "."}, "not the name of a file to write"),
        ({"comparisons": "c.jsonl", "label": LabelConfig(protocol="both")}, "of one protocol"),
        ({"output": "a.jsonl"}, "they should differ"),
        ({"comparisons": "./l.jsonl"}, "they should differ"),
    ],
)
def test_a_run_that_cannot_be_is_refused(changed, why):
    with pytest.raises(ValueError, match=why):
        LabelRun(**({"answers": "a.jsonl", "output": "l.jsonl"} | changed))


def test_half_a_character_in_an_answer_ends_no_step_on_the_way_to_comparisons(tmp_path):
    record = {
        "id": "a\ud83d",
        "messages": [{"role": "user", "content": "头疼怎么办？"}],
        "reference": "先量血压，注意休息。",
        "answers": [{"text": "祝好\ud83d"}, {"text": "先量血压，注意休息，多喝水。"}],
        "own": {"\ud83d": "\ud83d"},
    }
    answers, comparisons = tmp_path / "a.jsonl", tmp_path / "c.jsonl"
    answers.write_text(json.dumps(record), encoding="utf-8")
    run = LabelRun(
        answers=str(answers), output=str(tmp_path / "l.jsonl"), comparisons=str(comparisons)
    )
    run_labels(run, lambda line: None)
    (pair,) = read_comparisons(comparisons)
    assert pair.rejected[0].content == "祝好\ufffd"
    assert pair.id.startswith("a\ufffd")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_labeller_that_is_told_to_stop_waits_for_its_calls_and_asks_no_more(
    tmp_path, monkeypatch, number
):
    """Its main thread gets the signal while replies are under way, which are paid for."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    answers = tmp_path / "answers.jsonl"
    rows = [
        {
            "id": f"p{n}",
            "messages": [{"role": "user", "content": f"头痛{n}天了？"}],
            "reference": "休息。",
            "answers": [{"text": f"多喝水{n}。"}],
        }
        for n in range(9)
    ]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def reply(body, index):
        if index == 2:
            os.kill(os.getpid(), number)
        part = {"reason": "r", "score": 4}
        return json.dumps(dict.fromkeys(CRITERIA, part))

    with ScriptedServer(reply) as server:
        cfg = LabelRun(
            answers=str(answers),
            output=str(tmp_path / "labels.jsonl"),
            openai=OpenAIJudgeConfig(model="scripted", server=ServerConfig(base_url=server.url)),
            label=LabelConfig(concurrency=3),
        )
        with pytest.raises(Interrupted, match=r"stopped with \d of 9 judgements to ask for"):
            run_labels(cfg, lambda line: None)
        kept = [one for one in read_judgements(cfg.output) if not one.failed]
        assert len(kept) == server.paid and 3 <= server.paid <= 6
        labels = run_labels(cfg, lambda line: None)
        assert labels is not None and labels.verdicts == server.paid == 9
