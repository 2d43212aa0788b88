"""Server faults and kills: rows are those of an unbroken run, and no reply is paid for twice."""

import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections import Counter

import pytest

from tests.killing import kill
from tests.synthesis import run_synthesis, scripted_polishing
from tests.synthesis.run_synthesis import result
from tests.synthesis.scripted_consultations import ScriptedConsultations, write_cases
from tests.synthesis.scripted_examiner import examine, exams
from tests.synthesis.scripted_instructions import ScriptedInstructions
from tests.synthesis.teacher_server import KEY, MODEL, TeacherServer, price_table, some_fault

ROOT = pathlib.Path(__file__).resolve().parents[2]
AT_ONCE = 4  # Requests under way: as many replies a kill can lose.


def instructions(folder):
    return {"num_rows": 60, "batch_size": 6}


def conversations(folder):
    cases = write_cases(folder / "cases.json", 24)
    return {"cases": (cases,), "num_rows": 24, "batch_size": 8, "max_exchanges": 6}


def real_instructions(folder):
    source = scripted_polishing.write_source(folder / "source.jsonl", 160, exchanges=1)
    return {"source": (source,), "num_rows": 160, "batch_size": 20}


def real_conversations(folder):
    source = scripted_polishing.write_source(folder / "source.jsonl", 160, exchanges=3)
    return {"source": (source,), "num_rows": 160, "batch_size": 20}


def open_questions(folder):
    source = folder / "exams.jsonl"
    rows = [json.dumps(row, ensure_ascii=False) for row, _ in exams(80)]
    source.write_text("\n".join(rows), encoding="utf-8")
    return {"source": (str(source),), "num_rows": 80, "batch_size": 16}


KINDS = {
    "distilled_instruction": (ScriptedInstructions, instructions),
    "distilled_conversation": (ScriptedConsultations, conversations),
    "real_instruction": (lambda: scripted_polishing.polish, real_instructions),
    "real_conversation": (lambda: scripted_polishing.polish, real_conversations),
    "verifiable": (lambda: examine, open_questions),
}


def flags(kind, folder, server):
    folder.mkdir(exist_ok=True)
    return {
        "kind": kind,
        "output": str(folder / "rows.jsonl"),
        "teacher": f"openai:{MODEL}",
        "base_url": server.url,
        "prices": price_table(folder / "prices.json"),
        "concurrency": AT_ONCE,
        **KINDS[kind][1](folder),
    }


def start(given):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.synthesis.run_synthesis", json.dumps(given)],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_and_kill(given, server, *, num_kills, num_needed):
    """Kills the run so often, each time after a further part of its calls, and lets it end."""
    draw = random.Random(0)
    for number in range(1, num_kills + 1):
        process = start(given)
        while len(server.calls) < number * num_needed // (num_kills + 1):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.05))
        assert process.poll() is None, "the run was over before it was killed"
        kill(process)
    process = start(given)
    output, _ = process.communicate()
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "num_kills"), [("distilled_instruction", 1), *((kind, 5) for kind in KINDS)]
)
def test_faults_of_the_server_and_kills_change_nothing_and_pay_nothing_twice(
    tmp_path, monkeypatch, kind, num_kills
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    teacher = KINDS[kind][0]
    with TeacherServer(teacher()) as server:
        run_synthesis.run(flags(kind, unbroken, server))
        needed = Counter(call.body for call in server.calls)
    with TeacherServer(teacher(), fault=some_fault(0.3, seed=1), delay_s=0.05) as server:
        given = flags(kind, killed, server)
        run_and_kill(given, server, num_kills=num_kills, num_needed=needed.total())
        assert result(killed) == result(unbroken)
        # A reply that was on its way when the run was killed is asked for again, and no other.
        delivered = Counter(call.body for call in server.delivered())
        assert delivered.keys() == needed.keys()
        assert (delivered - needed).total() <= num_kills * AT_ONCE
        spent = json.loads((killed / "rows.jsonl.report.json").read_text(encoding="utf-8"))["cost"]
        # A call is booked before it is sent: killed in between, it never reaches the server.
        assert len(server.calls) <= spent["requests"] <= len(server.calls) + num_kills * AT_ONCE
        before = len(server.calls)
        run_synthesis.run(given)
        assert len(server.calls) == before
        assert result(killed) == result(unbroken)
