"""The notebook for beginners: it is whole, and its cells run in order at tiny size."""

import html
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import hub_server as hubs

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
TINY = {
    "clinic.sizes.dialogues": 24,
    "clinic.sizes.held_out_dialogues": 12,
    "clinic.sizes.prompts": 12,
    "clinic.sizes.held_out_prompts": 8,
    "clinic.sizes.cases": 2,
    "clinic.sizes.exams": 2,
    "clinic.sizes.pairs": 4,
    "sft.data.held_out.share": 0.25,
    "sft.num_steps": 2,
    "answers.num_samples": 3,
    "answers.sampling.max_new_tokens": 8,
    "reward.data.held_out.share": 0.25,
    "reward.num_steps": 2,
    "ppo.rollout.num_prompts": 8,
    "ppo.rollout.max_new_tokens": 8,
    "ppo.num_iterations": 1,
    "ppo.num_epochs": 1,
    "ppo.optimizer.warmup_steps": 0,
    "ppo.value.warmup_iterations": 0,
    "ppo.value.optimizer.warmup_steps": 0,
    "ppo.judging.every": 1,
    "ppo.judging.num_prompts": 2,
    "evaluation.num_samples": 2,
    "evaluation.max_new_tokens": 8,
}


@pytest.fixture(scope="module")
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_kept_without_outputs(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_every_cell_has_its_own_id_and_one_holds_the_parameters(cells):
    assert len({cell["id"] for cell in cells}) == len(cells)
    tagged = [cell for cell in cells if cell["metadata"].get("tags") == ["parameters"]]
    assert len(tagged) == 1


@pytest.mark.slow
def test_the_notebook_runs_from_its_data_to_the_push(tmp_path):
    (tmp_path / "base").mkdir()
    hubs.save_qwen(tmp_path / "base")
    parameters = tmp_path / "parameters.py"
    base = str(tmp_path / "base")
    parameters.write_text(f"BASE_MODEL = {base!r}\nFIELDS = {TINY!r}\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "run_notebook.py", NOTEBOOK, parameters],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    run = tmp_path / "runs" / "quickstart"
    assert "trained" in done.stdout and "real_conversation.jsonl" in done.stdout
    assert json.loads((run / "export" / "release.json").read_text(encoding="utf-8"))
    (shown,) = tmp_path.glob("*.html")
    report = html.escape((run / "report.html").read_text(encoding="utf-8"))
    assert report in shown.read_text(encoding="utf-8")
    assert "huatuo-quickstart" in done.stdout and "model.safetensors" in done.stdout
