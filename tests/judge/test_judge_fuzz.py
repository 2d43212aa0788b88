"""Thousands of odd replies through the whole command, each of which knows what it said.

Whatever comes: no traceback, no lost reply, no verdict that a reply does not say, counts that add
up, and an error exactly where the judge cannot go on or nothing was judged.
"""

import random
import re

import pytest

from huatuo_jax.judge.judgements import current
from huatuo_jax.judge.spending import SpendingFile
from huatuo_jax.preferences.label import spending_path
from tests.judge.mocked_server import MockedServer, label
from tests.judge.odd_replies import OddServer
from tests.judge.planted_answers import make_answers


def check_lines(lines, said):
    """Every line is what its reply said, and every reply that was delivered has its line."""
    seen = set()
    for line in lines:
        number = re.search(r"#(\d+)#", line.raw or "")
        if number is None:
            assert line.failed
            continue
        number = int(number[1])
        assert number not in seen and said[number].delivered
        seen.add(number)
        expected = said[number].verdict
        found = line.scores if line.protocol == "score" else line.p_first
        if expected is None or isinstance(expected, dict):
            assert found == expected, (line, said[number])
        else:
            assert found == pytest.approx(expected, abs=1e-6), (line, said[number])
        assert line.failed or line.error is None
    delivered = {number for number, one in enumerate(said) if one.delivered}
    assert seen == delivered


def check_spending(output, lines, said):
    """Every request is in the spending file, with the tokens that the server told."""
    file = SpendingFile(spending_path(output))
    totals = file.totals()
    file.close()
    told = [one.usage for one in said if one.usage is not None]
    assert totals.requests == len(said)
    assert totals.usage.input_tokens == sum(prompt for prompt, _ in told)
    assert totals.usage.output_tokens == sum(made for _, made in told)
    of_lines = sum(line.usage["output_tokens"] for line in lines if line.usage)
    assert of_lines <= totals.usage.output_tokens


def check_run(ran, questions, *, ended):
    """The counts add up, and the error says whether anything was judged."""
    standing = current(ran.lines)
    verdicts = sum(not line.failed for line in standing)
    if ran.labels is not None:
        labels = ran.labels
        assert labels.missing == 0 and verdicts == labels.verdicts > 0
        assert labels.verdicts + labels.failed == questions == len(standing)
        assert f"{verdicts} verdicts, {labels.failed} failed judgements, 0 not asked" in ran.told
        assert not ended
    elif not ended:
        assert "no judgement succeeded" in str(ran.error) and verdicts == 0
    assert ran.error is None or str(ran.error).isprintable()
    ran.told.encode()


def fuzz(seed, tmp_path, monkeypatch):
    """One server, asked in up to three runs; returns the number of its replies."""
    lot = random.Random(seed)
    protocol = lot.choice(["score", "pairwise"])
    log_probs = protocol == "pairwise" and lot.random() < 0.5
    concurrency = lot.choice([1, 3, 8])
    answers, output = tmp_path / f"answers{seed}.jsonl", tmp_path / f"labels{seed}.jsonl"
    make_answers(answers, num_prompts=lot.randint(3, 25), num_answers=2)
    questions = 2 * answers.read_text(encoding="utf-8").count("\n")
    ends_at = lot.choice([None, None, 0, lot.randint(1, 60)])
    odd = OddServer(lot, ends_at=ends_at, odd=lot.choice([0.1, 0.5, 1.0]))
    with monkeypatch.context() as patch:
        MockedServer(patch, odd.reply)
        for _ in range(3):
            before = len(odd.said)
            ran = label(
                answers,
                output,
                protocol=protocol,
                log_probs=log_probs,
                concurrency=concurrency,
            )
            ended = [number for number, one in enumerate(odd.said) if one.kind == "end"]
            if ended:
                assert len(odd.said) - max(ended[0], before) <= concurrency, (
                    seed,
                    odd.end,
                    ran.error,
                )
            check_lines(ran.lines, odd.said)
            if not (output.exists() or any(one.delivered for one in odd.said)):
                assert ran.error is not None
                continue
            check_spending(output, ran.lines, odd.said)
            check_run(ran, questions, ended=bool(ended))
    return len(odd.said)


@pytest.mark.parametrize("seeds", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_odd_replies_by_the_thousand(tmp_path, monkeypatch, seeds):
    assert sum(fuzz(seed, tmp_path, monkeypatch) for seed in range(seeds)) > 25 * seeds


@pytest.mark.slow
def test_odd_replies_by_ten_thousands(tmp_path, monkeypatch):
    assert sum(fuzz(seed, tmp_path, monkeypatch) for seed in range(1000, 1800)) > 20_000
