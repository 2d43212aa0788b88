"""Distilled instructions of a scripted teacher: every planted fault is found, and no other."""

import json
import random
from collections import Counter

import pytest

from huatuo_jax import synthesize
from huatuo_jax.core.files import lock_file
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.synthesis.instructions import InstructionMaker, read_seeds
from huatuo_jax.synthesis.run import MAKERS, SynthesisKind, SynthesisSettings
from huatuo_jax.synthesis.tables import draw_settings, read_table
from tests.synthesis import run_synthesis
from tests.synthesis.run_synthesis import result
from tests.synthesis.scripted_instructions import ScriptedInstructions
from tests.synthesis.teacher_server import KEY, MODEL, TeacherServer, price_table, some_fault


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def flags(folder, server, **given):
    return {
        "kind": "distilled_instruction",
        "output": str(folder / "rows.jsonl"),
        "teacher": f"openai:{MODEL}",
        "base_url": server.url,
        "prices": price_table(folder / "prices.json"),
        "num_rows": 60,
        "batch_size": 6,
        **given,
    }


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """Some hundred rows: their folder and the teacher."""
    folder, teacher = tmp_path_factory.mktemp("long"), ScriptedInstructions()
    with TeacherServer(teacher) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        run_synthesis.run(flags(folder, server, num_rows=260, batch_size=16))
    return folder, teacher


def test_every_planted_fault_is_found_and_no_other(long_run):
    folder, teacher = long_run
    kept = rows_of(folder / "rows.jsonl")
    rejected = rows_of(folder / "rows.jsonl.rejected.jsonl")
    assert len(kept) >= 260
    found = Counter(one["reason"] for one in rejected)
    items = Counter(fault for fault in teacher.planted.values() if fault)
    answers = Counter(fault for fault in teacher.answers.values() if fault)
    whole = Counter(teacher.whole.values())
    planted = [*items.values(), *answers.values(), *whole.values()]
    assert min(planted) >= 2, (items, answers, whole)
    for one in kept:
        assert teacher.planted[one["instruction"]] is None, one["instruction"]
        assert teacher.answers[one["messages"][0]["content"]] is None
    for one in rejected:
        text, _, _ = one["sample"].partition("\n\n")
        if one["reason"] in ("echo", "cut off") or one["sample"] in teacher.whole:
            continue
        if text in teacher.planted:
            assert teacher.planted[text] == one["reason"], one
    for reason in found.keys() - {"near duplicate"}:
        assert found[reason] == items[reason] + answers[reason] + whole[reason], reason
    assert found["near duplicate"] >= items["near duplicate"] > 0
    assert set(found) == set(items) | set(answers) | set(whole)


def test_yield_and_cost_are_the_servers_own_count(tmp_path):
    with TeacherServer(ScriptedInstructions(), fault=some_fault(0.1)) as server:
        run_synthesis.run(flags(tmp_path, server))
    report = json.loads((tmp_path / "rows.jsonl.report.json").read_text(encoding="utf-8"))
    delivered = server.delivered()
    cost = report["cost"]
    assert cost["requests"] == len(server.calls)
    assert cost["input_tokens"] == sum(call.input_tokens for call in delivered)
    assert cost["output_tokens"] == sum(call.output_tokens for call in delivered)
    assert cost["money"] == pytest.approx(server.money(delivered), abs=1e-9)
    assert cost["unknown_requests"] == sum(c.outcome in ("cut", "garbled") for c in server.calls)
    rows = len(rows_of(tmp_path / "rows.jsonl"))
    rejected = len(rows_of(tmp_path / "rows.jsonl.rejected.jsonl"))
    assert (report["rows"], report["candidates"]) == (rows, rows + rejected)
    assert report["yield"] == rows / (rows + rejected)
    assert cost["money_per_row"] == pytest.approx(server.money(delivered) / rows, abs=1e-12)


def test_a_budget_stops_the_run_and_a_larger_one_goes_on(tmp_path):
    with TeacherServer(ScriptedInstructions()) as server:
        whole = tmp_path / "whole"
        whole.mkdir()
        run_synthesis.run(flags(whole, server))
        needed = len(server.calls)
        parts = tmp_path / "parts"
        parts.mkdir()
        given = flags(parts, server)
        with pytest.raises(ValueError, match="max_requests=20 is spent.*the rows that are done"):
            run_synthesis.run({**given, "max_requests": 20})
        assert len(server.calls) == needed + 20
        report = json.loads((parts / "rows.jsonl.report.json").read_text(encoding="utf-8"))
        assert "max_requests=20 is spent" in report["stopped"]
        assert 0 < report["rows"] == len(rows_of(parts / "rows.jsonl"))
        run_synthesis.run(given)
        assert len(server.calls) == 2 * needed
        assert result(parts) == result(whole)


def test_a_dry_run_sends_nothing_and_tells_the_cost(tmp_path, capsys):
    with TeacherServer(ScriptedInstructions()) as server:
        run_synthesis.run(flags(tmp_path, server, dry_run=True, num_rows=100))
        assert not server.calls
    told = capsys.readouterr().out
    assert "5 batches of 24 rows: 30 requests to instruct, 120 requests to answer" in told
    assert "150 requests, about " in told and " EUR" in told
    assert "nothing was sent or computed" in told
    assert [path.name for path in tmp_path.iterdir()] == ["prices.json"]


def test_another_setting_for_the_same_output_is_refused(tmp_path):
    with TeacherServer(ScriptedInstructions()) as server:
        run_synthesis.run(flags(tmp_path, server, num_rows=10))
        before = len(server.calls)
        with pytest.raises(ValueError, match="seed was 0 and is 1 now; choose another --output"):
            run_synthesis.run(flags(tmp_path, server, num_rows=10, seed=1))
        assert len(server.calls) == before
        run_synthesis.run(flags(tmp_path, server, num_rows=40))  # More rows are no other setting.


def test_two_runs_at_once_for_one_output_are_refused(tmp_path):
    with TeacherServer(ScriptedInstructions()) as server:
        given = flags(tmp_path, server, num_rows=10)
        run_synthesis.run(given)
        with (tmp_path / "rows.jsonl.settings.json").open("rb") as other:
            lock_file(other.fileno(), tmp_path)
            with pytest.raises(ValueError, match="another process writes this file"):
                run_synthesis.run(given)
        run_synthesis.run(given)


def test_a_dry_run_tells_the_same_when_replies_are_there(tmp_path, capsys):
    with TeacherServer(ScriptedInstructions()) as server:
        given = flags(tmp_path, server, num_rows=10)
        run_synthesis.run({**given, "dry_run": True})
        first = capsys.readouterr().out
        run_synthesis.run(given)
        capsys.readouterr()
        run_synthesis.run({**given, "dry_run": True})
        assert capsys.readouterr().out == first


def test_rows_load_as_dialogues_to_train_on(tmp_path):
    with TeacherServer(ScriptedInstructions()) as server:
        run_synthesis.run(flags(tmp_path, server))
    reading = read_dialogues(tmp_path / "rows.jsonl")
    dialogues = list(reading)
    assert not reading.errors and len(dialogues) >= 60
    assert {one.kind for one in dialogues} == {"distilled_instruction"}
    assert {one.source for one in dialogues} == {f"synthesis, {MODEL}"}
    assert all([m.role for m in one.messages] == ["user", "assistant"] for one in dialogues)


def test_departments_roles_and_use_cases_come_equally_often(long_run):
    report = json.loads((long_run[0] / "rows.jsonl.report.json").read_text(encoding="utf-8"))
    table = read_table()
    for name, entries in (
        ("department", table.departments),
        ("role", table.roles),
        ("use_case", table.use_cases),
    ):
        counts = report["labels"][name]
        assert set(counts) == {one.zh for one in entries}
        mean = report["rows"] / len(entries)
        # Rows of the last batch are rejected after all were drawn.
        assert 0.5 * mean <= min(counts.values()) and max(counts.values()) <= 1.5 * mean


def test_settings_are_drawn_for_what_the_kept_rows_have_least_of():
    table = read_table()
    kept = [{"department": one.zh} for one in table.departments[1:]]
    (first,) = draw_settings(table, ("zh",), 1, kept=kept, draw=random.Random(0))
    assert first.department == table.departments[0]
    drawn = draw_settings(table, ("zh", "en"), 100, kept=[], draw=random.Random(0))
    assert Counter(one.language for one in drawn) == {"zh": 50, "en": 50}


def test_a_request_is_in_one_language_and_both_come_equally_often():
    maker = InstructionMaker(
        seeds=read_seeds(), table=read_table(), languages=("zh", "en"), batch_size=9, per_request=3
    )
    counts = Counter()
    for number in range(4):
        for _, job in maker.batch(number, []):
            (request,) = next(job)
            (language,) = {one.language for one in request.material["settings"]}
            in_chinese = "请编写 3 条" in request.messages[-1]["content"]
            assert in_chinese == (language == "zh")
            counts[language] += 1
    assert abs(counts["zh"] - counts["en"]) <= 4


def test_shipped_seeds_are_in_both_languages_and_no_two_alike():
    seeds = read_seeds()
    assert Counter(one.language for one in seeds) == {"zh": 32, "en": 24}
    assert len({one.prompt for one in seeds}) == len(seeds)
    kind: SynthesisKind = "distilled_instruction"
    maker, known = MAKERS[kind](kind, SynthesisSettings(teacher="openai:x"), "--")
    assert len(known) == len(seeds) and maker.kind == "distilled_instruction"


def test_seeds_in_the_form_of_self_instruct_are_read(shared_data):
    seeds = read_seeds(shared_data / "8_synthesis" / "self_instruct_seed_tasks.jsonl")
    assert len(seeds) == 175 and {one.language for one in seeds} == {"en"}


WRONG = {
    "no seeds": ({"seeds": "missing.jsonl"}, "seeds: there is no file missing.jsonl"),
    "a language": ({"languages": ("fr",)}, "--languages=fr should be zh, en or zh,en"),
    "no rows": ({"num_rows": 0}, "--num_rows=0 must be at least 1"),
    "money without a price": (
        {"max_cost": 1.0, "teacher": "openai:unknown"},
        "--max_cost=1 needs a price for 'unknown'",
    ),
    "no requests": ({"max_requests": 0}, "--max_requests=0 must be at least 1"),
    "no money": ({"max_cost": 0.0}, "--max_cost=0 must be above 0"),
    "no time": ({"timeout_s": 0.0}, "--timeout_s=0 must be above 0"),
    "no tokens": ({"max_new_tokens": 0}, "--max_new_tokens=0 must be at least 1"),
    "no rate": ({"tokens_per_minute": -5}, "--tokens_per_minute=-5 must be at least 1"),
    "a similarity": ({"near_duplicate": 1.5}, "--near_duplicate=1.5 must be above 0 and at most 1"),
    "no temperature": (
        {"temperature": float("nan")},
        "--temperature=nan must be a number of at least 0",
    ),
    "another kind's file": (
        {"cases": ("cases.json",)},
        "--cases is for distilled_conversation; distilled_instruction reads no such file",
    ),
    "a server's model by its name alone": (
        {"teacher": "no-such-model", "base_url": None},
        "a model behind a server is named openai:NAME",
    ),
    "no teacher": ({"teacher": "", "base_url": None}, "--teacher is empty: name a saved model"),
    "no model of a server": ({"teacher": "openai:"}, "--teacher is empty: name a saved model"),
    "a missing test set": ({"evaluation_sets": ("missing.jsonl",)}, "missing.jsonl: no such file"),
    "a missing table": ({"table": "missing.json"}, "table: there is no file missing.json"),
    "money for the clinic": (
        {"max_cost": 1.0, "teacher": "clinic", "base_url": None, "prices": None},
        "--max_cost is for a teacher named openai:NAME, and --teacher is clinic",
    ),
}


SEEDS = {
    "": "there are no seeds",
    "no JSON": ":1: not a line of JSON",
    '{"text": "咳嗽怎么办？"}': ":1: instruction is missing or empty",
    '{"instruction": "咳嗽怎么办？", "input": 5}': ":1: input should be text",
    '{"instruction": "Que faire ?", "language": "fr"}': ":1: language='fr' must be zh or en",
    '["咳嗽怎么办？"]': ":1: holds a list, it should be an object",
}


@pytest.mark.parametrize("content", SEEDS)
def test_seeds_of_another_form_are_named_with_their_line(tmp_path, content):
    path = tmp_path / "seeds.jsonl"
    path.write_text(content and f"{content}\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read_seeds(path)
    assert str(caught.value).startswith(str(path)) and SEEDS[content] in str(caught.value)


def test_an_output_that_is_not_ours_is_left_as_it_is(tmp_path):
    with TeacherServer(ScriptedInstructions()) as server:
        given = flags(tmp_path, server)
        mine = tmp_path / "rows.jsonl"
        mine.write_text("mine\n")
        with pytest.raises(ValueError, match="is there, and no synthesis made it"):
            run_synthesis.run(given)
        assert mine.read_text() == "mine\n"
        with pytest.raises(ValueError, match="is a folder; name a file in it"):
            run_synthesis.run({**given, "output": str(tmp_path)})
        with pytest.raises(ValueError, match="mine cannot be made a folder"):
            mine.rename(tmp_path / "mine")
            run_synthesis.run({**given, "output": str(tmp_path / "mine" / "rows.jsonl")})
        assert not server.calls


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line_before_anything_is_sent(tmp_path, case):
    given, message = WRONG[case]
    with TeacherServer(ScriptedInstructions()) as server:
        with pytest.raises((ValueError, OSError)) as caught:
            run_synthesis.run(flags(tmp_path, server, **given))
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not server.calls


def test_the_clinic_is_a_teacher_without_server_or_weights(tmp_path):
    synthesize.main(
        synthesize.Flags(
            kind="distilled_instruction", output=str(tmp_path / "rows.jsonl"), num_rows=40
        )
    )
    rows = rows_of(tmp_path / "rows.jsonl")
    assert len(rows) >= 40 and len(list(read_dialogues(tmp_path / "rows.jsonl"))) == len(rows)
    page = (tmp_path / "rows.jsonl.report.html").read_text(encoding="utf-8")
    assert "Yield and cost" in page and "huatuo_jax clinic" in page
    card = (tmp_path / "rows.jsonl.card.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "# distilled_instruction" in card
