"""Synthesis as the recipe's first stage: its rows are trained on, and it resumes as others do."""

import dataclasses
import json

import pytest

from huatuo_jax.recipe.recipe import Journal, run_rlaif
from huatuo_jax.recipe.synthesis import SynthesisConfig
from tests.recipe.tiny import tiny_clinic_recipe, tiny_recipe, write_dialogues
from tests.synthesis.scripted_instructions import ScriptedInstructions
from tests.synthesis.teacher_server import KEY, MODEL, TeacherServer, price_table

BOTH = SynthesisConfig(
    kinds=("distilled_instruction", "real_instruction"),
    source=("{workdir}/clinic/real_instruction.jsonl",),
    num_rows=6,
    batch_size=4,
)


def recipe(synthesis, *, base=None, stages=("synthesis", "sft", "report"), **changes):
    base = base or tiny_clinic_recipe()
    return dataclasses.replace(base, stages=stages, synthesis=synthesis, **changes)


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_its_rows_are_trained_on_and_told_in_the_report(tmp_path, capsys, on_one_device):
    run_rlaif(recipe(BOTH), tmp_path)
    told = capsys.readouterr().out
    assert "stage 1 of 3: synthesis\n" in told and "stage 2 of 3: sft\n" in told
    rows = {kind: rows_of(tmp_path / "synthesis" / f"{kind}.jsonl") for kind in BOTH.kinds}
    assert all(len(found) >= 6 for found in rows.values())
    result = Journal(tmp_path).stages["synthesis"]["result"]
    assert result == {f"rows of {kind}": len(found) for kind, found in rows.items()}
    (statistics,) = (tmp_path / "data").rglob("statistics.json")
    splits = json.loads(statistics.read_text(encoding="utf-8"))["splits"]
    for kind, found in rows.items():
        sources = [split["by_source"].get(f"synthesis_{kind}") for split in splits.values()]
        assert sum(one["examples"] for one in sources if one is not None) == len(found)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Data made by the teacher" in page and "huatuo_jax clinic" in page

    written = (tmp_path / "synthesis" / "real_instruction.jsonl").stat()
    run_rlaif(recipe(BOTH), tmp_path)
    told = capsys.readouterr().out
    assert "stage 1 of 3: synthesis, finished before" in told
    assert "stage 2 of 3: sft, finished before" in told
    assert written == (tmp_path / "synthesis" / "real_instruction.jsonl").stat()
    with pytest.raises(ValueError, match="stage 'synthesis' is finished .* num_rows: saved 6"):
        run_rlaif(recipe(dataclasses.replace(BOTH, num_rows=7)), tmp_path)


def test_the_judges_server_is_the_teacher_and_a_stopped_stage_pays_nothing_twice(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    base, data = tiny_recipe(tmp_path / "mine.jsonl"), tmp_path / "mine.jsonl"
    write_dialogues(data)
    section = SynthesisConfig(kinds=("distilled_instruction",), num_rows=24, batch_size=4)
    with TeacherServer(ScriptedInstructions()) as server:
        judge = dataclasses.replace(
            base.judge, base_url=server.url, model=MODEL, prices=price_table(tmp_path / "p.json")
        )

        def run(folder, **changes):
            changed = dataclasses.replace(section, **changes)
            run_rlaif(recipe(changed, base=base, judge=judge, stages=("synthesis",)), folder)

        run(tmp_path / "whole")
        needed = len(server.calls)
        with pytest.raises(ValueError, match="max_requests=9 is spent.*the rows that are done"):
            run(tmp_path / "parts", max_requests=9)
        assert not Journal(tmp_path / "parts").is_finished("synthesis")
        run(tmp_path / "parts")
        assert len(server.calls) == 2 * needed
    rows = [
        tmp_path / name / "synthesis" / "distilled_instruction.jsonl" for name in ("whole", "parts")
    ]
    assert rows[0].read_bytes() == rows[1].read_bytes()
    assert {row["source"] for row in rows_of(rows[0])} == {f"synthesis, {MODEL}"}


def test_nothing_is_made_where_fine_tuning_could_not_start(tmp_path):
    base = tiny_clinic_recipe()
    data = dataclasses.replace(base.sft.data, row_length=100_000)
    cfg = recipe(BOTH, sft=dataclasses.replace(base.sft, data=data))
    with pytest.raises(ValueError, match="sft.data.row_length=100000 must be at most"):
        run_rlaif(cfg, tmp_path)
    assert not (tmp_path / "synthesis").exists()


WRONG = {
    "no teacher": ({"source": ()}, {"clinic": None}, "needs judge.base_url"),
    "a kind twice": ({"kinds": ("real_instruction",) * 2}, {}, "'real_instruction' is given twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_section_that_cannot_be_is_refused_at_once(case):
    section, changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        recipe(dataclasses.replace(BOTH, **section), **changes)


def test_a_limit_of_the_judge_is_none_of_the_teacher():
    base = tiny_clinic_recipe()
    judge = dataclasses.replace(base.judge, base_url="http://x/v1", max_requests=100)
    with pytest.raises(ValueError, match="synthesis.max_requests must be given, as judge.max"):
        recipe(BOTH, judge=judge)
    recipe(dataclasses.replace(BOTH, max_requests=50), judge=judge)


def test_a_stage_that_is_left_out_again_is_forgotten_and_its_rows_are_no_source(tmp_path):
    cfg = recipe(BOTH, stages=("synthesis", "report"))
    run_rlaif(cfg, tmp_path)
    assert "Data made by the teacher" in (tmp_path / "report.html").read_text(encoding="utf-8")
    run_rlaif(dataclasses.replace(cfg, synthesis=SynthesisConfig()), tmp_path)
    assert "synthesis" not in Journal(tmp_path).stages
    assert "Data made by the teacher" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_rows_of_each_kind_are_a_source_of_fine_tuning_beside_the_others(tmp_path):
    before = recipe(SynthesisConfig()).in_workdir(tmp_path).sft.data.sources
    cfg = recipe(BOTH).in_workdir(tmp_path)
    assert cfg.sft.data.sources[: len(before)] == before
    assert [(one.name, one.kind, one.paths) for one in cfg.sft.data.sources[len(before) :]] == [
        (f"synthesis_{kind}", kind, (f"{tmp_path}/synthesis/{kind}.jsonl",)) for kind in BOTH.kinds
    ]


def test_a_missing_source_is_named_with_its_field(tmp_path):
    section = dataclasses.replace(BOTH, source=())
    with pytest.raises(ValueError, match="give --config.synthesis.source=FILE"):
        run_rlaif(recipe(section), tmp_path)
