"""The stage as a user runs it: comparisons and a policy to start from, a folder of results."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.checkpoint.models import find_model, load_params, save_orbax
from huatuo_jax.core import sharding
from huatuo_jax.core.config import replaced
from huatuo_jax.data.batches import BatchIterator
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.dpo import DpoConfig, dpo_step, run_dpo
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource, open_comparisons
from huatuo_jax.preferences.rows import abstract_rows
from huatuo_jax.training.initial_model import ModelConfig, open_model
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.metrics import is_time_field, read_rows
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.scoring import GivenAnswer, Scorer
from huatuo_jax.training.update import update_program
from tests import made_up_memory
from tests.preferences.tiny import BACKBONE, comparisons
from tests.tiny import TOKENIZER, write_rows

ROOT = pathlib.Path(__file__).parents[2]
HELD_OUT = HeldOutConfig(share=0.2)

# Runs here are on one device, which is quick.
pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Comparisons, a policy and a model that scores."""
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "comparisons.jsonl", comparisons(60))
    for head in ("lm", "score"):
        params = init_params(jax.random.key(1), BACKBONE, ComputeConfig(), head=head)
        save_orbax(
            params, BACKBONE, folder / head, head=head, source_folder=pathlib.Path(TOKENIZER)
        )
    return folder


def _data(files):
    return ComparisonsConfig(
        sources=(ComparisonSource(paths=(str(files / "comparisons.jsonl"),)),),
        max_length=128,
        row_length=256,
        held_out=HELD_OUT,
    )


def _config(files, *, head="lm", lora=None, **changed):
    settings = {
        "model": ModelConfig(directory=str(files / head), lora=lora),
        "data": _data(files),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0),
        "num_steps": 10,
        "batch_size": 4,
        "loop": LoopConfig(evaluate_every=5, checkpoint_every=2, tensorboard=False),
    }
    return DpoConfig(**(settings | changed))


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run_dpo(_config(files), workdir)


@pytest.mark.slow
def test_auto_takes_the_most_rows_that_fit_and_changes_no_number(
    trained, files, tmp_path, monkeypatch, capsys
):
    config = _config(files)
    model = open_model(config.model, config.compute.compute_config())
    mesh = config.mesh.make()
    batch = abstract_rows(config, mesh, num_pairs=4)

    def programs(size):
        step = dpo_step(replaced(config, {"micro_batch_size": size}), model, mesh, num_steps=10)
        return [update_program("dpo", step, batch, mesh)]

    made_up_memory.make_up(monkeypatch, programs_of=programs, fits=2, too_large=4)
    found = run_dpo(config, tmp_path)
    assert made_up_memory.told("dpo", size=2, rows=4) in capsys.readouterr().err
    assert found == pytest.approx(trained[1], rel=1e-3, abs=1e-4)  # Ten steps of rounding.


def _margin(before, after, answers):
    """How much more the second model prefers the chosen answers than the first does, on average."""

    def log_probs(info):
        scorer = Scorer(
            Transformer(info.cfg),
            {"params": load_params(info)},
            mesh=sharding.make_mesh(),
            rows_at_once=4,
        )
        given = [GivenAnswer(one.token_ids, int(np.argmax(one.is_answer))) for one in answers]
        return np.array([each.sum() for each in scorer.log_probs(given)])

    gained = log_probs(find_model(after)) - log_probs(find_model(before))
    return (gained[::2] - gained[1::2]).mean()


def test_a_preference_that_is_there_is_learned(trained, files):
    workdir, result = trained
    rows = read_rows(workdir / "dpo" / "metrics.jsonl")
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11))
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["dpo/margin"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 0.02
    assert [row["step"] for row in rows if "eval/loss" in row] == [5, 10]
    assert result["step"] == 10 and result["eval/accuracy"] == 1.0 and result["eval/margin"] > 0
    account = json.loads((workdir / "dpo" / "data.json").read_text())
    assert sum(account["used"].values()) == account["records"] == account["rows"]
    # The saved model, by another way: log-probabilities of the held-out answers.
    held_out = open_comparisons(_data(files), load_tokenizer(TOKENIZER)).held_out
    answers = [
        group.answers[place]
        for group in held_out
        for pair in group.pairs
        for place in (pair.chosen, pair.rejected)
    ]
    margin = _margin(files / "lm", workdir / "dpo" / "model", answers)
    assert result["eval/margin"] == pytest.approx(0.1 * margin, rel=1e-3)


def test_a_finished_stage_is_not_run_again(trained, files):
    workdir, result = trained
    assert run_dpo(_config(files), workdir) == result


class _Stop(Exception):
    pass


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param(None, marks=pytest.mark.slow, id="full"),
        pytest.param(LoraConfig(rank=2, alpha=4.0), id="adapters"),
    ],
)
def test_a_run_that_broke_off_ends_as_an_unbroken_one(files, tmp_path, lora):
    config = _config(files, lora=lora, num_steps=6)
    expected = run_dpo(config, tmp_path / "unbroken")
    original = BatchIterator.__next__

    def next_or_stop(self):
        if self.get_state()["next_row"] == 5 * 4 and self._end_row == 6 * 4:
            raise _Stop
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchIterator, "__next__", next_or_stop)
        with pytest.raises(_Stop):
            run_dpo(config, tmp_path / "broken")
    assert run_dpo(config, tmp_path / "broken") == expected
    weights, numbers = [], []
    for name in ("unbroken", "broken"):
        params = load_params(find_model(tmp_path / name / "dpo" / "model"))
        weights.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)])
        rows = read_rows(tmp_path / name / "dpo" / "metrics.jsonl")
        numbers.append([{k: v for k, v in row.items() if not is_time_field(k)} for row in rows])
    assert weights[0] == weights[1]
    assert numbers[0] == numbers[1]


def test_what_cannot_be_is_told_before_anything_is_compiled(files, tmp_path):
    with pytest.raises(ValueError, match="this model scores; a policy needs a token head"):
        run_dpo(_config(files, head="score"), tmp_path)
    with pytest.raises(ValueError, match="beta=0.0 must be above 0"):
        _config(files, beta=0.0)
    with pytest.raises(ValueError, match="micro_batch_size=3 must divide batch_size=4"):
        _config(files, micro_batch_size=3)
    config = replaced(_config(files), {"data.max_length": 256, "data.row_length": 512})
    with pytest.raises(ValueError, match="max_length=256 must be at most the model's 128"):
        run_dpo(config, tmp_path)


@pytest.mark.slow
def test_the_sample_config_runs_as_it_stands(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "launch/train.py",
            "--config=configs/dpo.py",
            f"--workdir={tmp_path}",
            "--config.sft.num_steps=12",
            "--config.dpo.num_steps=12",
        ],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "dpo: finished in" in done.stdout
    assert find_model(tmp_path / "dpo" / "model").head == "lm"
