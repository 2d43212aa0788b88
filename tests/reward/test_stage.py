"""The stage as a user runs it: comparisons and a model to start from, a folder with the results."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.checkpoint.models import find_model, load_params, save_orbax
from huatuo_jax.core import sharding
from huatuo_jax.core.config import replaced
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.batches import BatchIterator
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource, open_comparisons
from huatuo_jax.preferences.rows import abstract_rows
from huatuo_jax.reward.config import ProbeConfig, RewardConfig
from huatuo_jax.reward.score_file import read_answers
from huatuo_jax.reward.stage import open_backbone, reward_step, run_reward
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig, open_model
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.metrics import is_time_field, read_rows
from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer
from huatuo_jax.training.scoring import load_normalization
from huatuo_jax.training.update import update_program
from tests import made_up_memory
from tests.preferences.tiny import BACKBONE, comparisons
from tests.tiny import TOKENIZER, write_rows

ROOT = pathlib.Path(__file__).parents[2]

# Runs here are on one device, which is quick; that meshes agree is shown by `test_losses`.
pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Comparisons, and answers of an SFT model."""
    folder = tmp_path_factory.mktemp("files")
    write_rows(folder / "comparisons.jsonl", comparisons(80))
    answers = [
        {
            "id": f"p{index}",
            "messages": [{"role": "user", "content": f"第{index}次咳嗽，怎么办？"}],
            "source": "sft",
            "answers": [
                {"text": text, "token_ids": [1]} for text in ("多休息。", f"{index}天后看看")
            ],
        }
        for index in range(6)
    ]
    write_rows(folder / "answers.jsonl", answers)
    return folder


def _config(files, **changed):
    model = changed.pop("model", {"backbone": BACKBONE, "tokenizer": TOKENIZER})
    settings = RewardConfig(
        model=ModelConfig(**model),
        data=ComparisonsConfig(
            sources=(ComparisonSource(paths=(str(files / "comparisons.jsonl"),)),),
            max_length=128,
            row_length=256,
            held_out=HeldOutConfig(share=0.2),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.0),
        **(
            {
                "num_steps": 12,
                "batch_size": 8,
                "margin_scale": 0.2,
                "loop": LoopConfig(evaluate_every=6, checkpoint_every=4, tensorboard=False),
            }
            | changed
        ),
    )
    return settings


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run_reward(_config(files), workdir)


def test_a_preference_that_is_there_is_learned_and_reported(trained):
    workdir, result = trained
    rows = [row for row in read_rows(workdir / "reward" / "metrics.jsonl") if "eval/loss" in row]
    assert [row["step"] for row in rows] == [6, 12]
    first = next(read_row for read_row in read_rows(workdir / "reward" / "metrics.jsonl"))
    assert first["train/cross_entropy"] == pytest.approx(np.log(2), abs=0.02)
    assert result["eval/accuracy"] == 1.0 and result["report/accuracy"] == 1.0
    report = json.loads((workdir / "reward" / "reward_report.json").read_text())
    assert report["accuracy"]["num_pairs"] == report["num_pairs"] == result["eval/pairs"]
    assert report["loss"] == pytest.approx(result["eval/cross_entropy"], rel=1e-4)
    assert report["length_baseline"]["accuracy"]["value"] == 1.0  # The good answer is longer.
    assert set(report["accuracy_by_source"]) == {"odd", "even"}
    account = json.loads((workdir / "reward" / "data.json").read_text())
    assert account["used"]["held out"] == report["num_pairs"] and not account["left_out"]
    assert sum(account["used"].values()) == account["records"] == account["rows"]
    assert set(report["accuracy_by_turns"]) == {"1", "2 to 3"}
    assert (workdir / "reward" / "reward_reliability.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_auto_takes_the_most_rows_that_fit_and_changes_no_number(
    trained, files, tmp_path, monkeypatch, capsys
):
    config = _config(files)
    model = open_backbone(config, config.model)
    mesh = config.mesh.make()
    batch = abstract_rows(config, mesh, num_pairs=4)

    def programs(size):
        step = reward_step(replaced(config, {"micro_batch_size": size}), model, mesh, num_steps=12)
        return [update_program("reward", step, batch, mesh)]

    made_up_memory.make_up(monkeypatch, programs_of=programs, fits=4, too_large=8)
    found = run_reward(config, tmp_path)
    assert made_up_memory.told("reward", size=4, rows=8) in capsys.readouterr().err
    numbers = {name: value for name, value in found.items() if not isinstance(value, str)}
    expected = {name: trained[1][name] for name in numbers}
    assert numbers == pytest.approx(expected, rel=1e-2, abs=1e-3)  # Twelve steps of rounding.
    first = [
        next(iter(read_rows(run / "reward" / "metrics.jsonl")))["train/loss"]
        for run in (tmp_path, trained[0])
    ]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_probes_are_reported_apart_and_change_nothing_else(trained, files, tmp_path, capsys):
    """The good answer, which is the longer one, is `chosen` in one file and `rejected` in another.

    Both call it a tie, which no accuracy counts.
    """
    made = [
        dataclasses.replace(one, id=f"probe {one.id}", p_chosen=0.5)
        for one in comparisons(100)[80:]
    ]
    reversed_ones = [
        dataclasses.replace(one, chosen=one.rejected, rejected=one.chosen) for one in made
    ]
    probes = (
        ProbeConfig(name="right", paths=(write_rows(tmp_path / "a.jsonl", made),), chosen="true"),
        ProbeConfig(
            name="wrong",
            paths=(write_rows(tmp_path / "b.jsonl", reversed_ones),),
            chosen="shorter",
            neutral=True,
        ),
    )
    before, result = trained
    found = run_reward(_config(files, probes=probes), tmp_path / "run")
    assert {name: found.pop(f"report/{name}_accuracy") for name in ("right", "wrong")} == {
        "right": 1.0,
        "wrong": 0.0,
    }
    assert found == result
    old, new = (
        json.loads((folder / "reward" / "reward_report.json").read_text())
        for folder in (before, tmp_path / "run")
    )
    assert old.pop("probes") == []
    right, wrong = new.pop("probes")
    assert new == old
    assert right["accuracy"] == {
        "value": 1.0,
        "low": 1.0,
        "high": 1.0,
        "num_pairs": 20,
        "num_cases": 20,
    }
    assert (right["length_accuracy"]["value"], wrong["length_accuracy"]["value"]) == (1.0, 0.0)
    assert (wrong["chosen"], wrong["neutral"]) == ("shorter", True)
    told = capsys.readouterr().out
    assert (
        "differ in wrong: the shorter one scores higher in 0.000 (0.000 to 0.000) of 20; " in told
    )
    assert "warning" not in told
    again = _config(files, probes=probes[:1])
    with pytest.raises(ValueError, match="probe"):
        run_reward(again, tmp_path / "run")


def test_a_probe_whose_prompts_are_trained_on_says_so(trained, files, tmp_path, capsys):
    path = write_rows(tmp_path / "same.jsonl", comparisons(80))
    probes = (ProbeConfig(name="seen", paths=(path,)),)
    run_reward(_config(files, probes=probes, num_steps=2), tmp_path / "run")
    assert re.search(
        r"probe seen: warning: \d+ of 80 prompts are trained on", capsys.readouterr().out
    )


def test_probes_of_one_name_and_without_files_are_refused():
    with pytest.raises(ValueError, match="paths is empty: probe 'truth' must name"):
        ProbeConfig(name="truth")
    probe = ProbeConfig(name="truth", paths=("a.jsonl",))
    with pytest.raises(ValueError, match="probes: truth is given twice"):
        _config(pathlib.Path("none"), probes=(probe, probe))


def test_scores_are_normalized_on_the_compared_answers_where_there_are_no_others(trained, files):
    workdir, result = trained
    model = find_model(workdir / "reward" / "model")
    assert (model.head, model.form, model.cfg) == ("score", "orbax", BACKBONE)
    normalization = load_normalization(model.folder)
    assert result["normalization/mean"] == normalization.mean
    assert "training comparisons" in normalization.answers
    scores = _scores_of(model, files / "comparisons.jsonl", _held_in(workdir))
    assert normalization.num_answers == len(scores)
    assert normalization.mean == pytest.approx(np.mean(scores), abs=1e-5)
    assert normalization.standard_deviation == pytest.approx(np.std(scores), rel=1e-4)


def _held_in(workdir):
    report = json.loads((workdir / "reward" / "reward_report.json").read_text())
    return report["comparisons"]["train_prompts"]


def _scores_of(model, path, num_prompts):
    """The saved model's score of each training answer, each alone in the model."""
    cfg = ComparisonsConfig(
        sources=(ComparisonSource(paths=(str(path),)),),
        max_length=128,
        row_length=256,
        held_out=HeldOutConfig(share=0.2),
    )
    groups = open_comparisons(cfg, load_tokenizer(model.folder)).train
    assert len(groups) == num_prompts
    return _alone(model, [one for group in groups for one in group.answers])


def _alone(model, answers):
    variables = {"params": load_params(model)}
    transformer = Transformer(model.cfg)

    @jax.jit
    def score(ids_1T):
        hidden_BTD = transformer.apply(variables, ids_1T)
        return transformer.apply(variables, hidden_BTD, method="scores")[0]

    scores = []
    for one in answers:
        ids = np.zeros(128, np.int32)
        ids[: len(one.token_ids)] = one.token_ids
        scores.append(float(score(ids[None])[len(one.token_ids) - 1]))
    return np.array(scores)


def test_a_file_of_sft_answers_sets_the_normalization(files, tmp_path):
    path = str(files / "answers.jsonl")
    config = _config(files, normalization_answers=path, num_steps=2)
    run_reward(config, tmp_path)
    model = find_model(tmp_path / "reward" / "model")
    normalization = load_normalization(model.folder)
    assert (normalization.num_answers, normalization.answers) == (12, "answers.jsonl")
    cfg = ComparisonsConfig(sources=(ComparisonSource(),), max_length=128, row_length=256)
    scores = _alone(model, read_answers(path, cfg, load_tokenizer(TOKENIZER)))
    normalized = normalization.apply(scores)
    np.testing.assert_allclose([normalized.mean(), normalized.std()], [0, 1], atol=2e-3)
    # Another file is another run.
    write_rows(tmp_path / "other.jsonl", [json.loads(line) for line in open(path)][1:])
    config = replaced(config, {"normalization_answers": str(tmp_path / "other.jsonl")})
    with pytest.raises(ValueError, match="normalization_answers: saved"):
        run_reward(config, tmp_path)


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_breaks_off_ends_as_an_unbroken_one(trained, files, tmp_path, monkeypatch):
    plain = BatchIterator.__next__

    def breaks_off(self):
        if self.get_state()["next_row"] == 9 * 8:
            raise Stopped
        return plain(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(BatchIterator, "__next__", breaks_off)
        run_reward(_config(files), tmp_path)
    assert not (tmp_path / "reward" / "finished.json").exists()
    result = run_reward(_config(files), tmp_path)
    _assert_same(tmp_path, trained[0])
    assert result == trained[1]


def _assert_same(found, expected):
    """The same parameters bit for bit, and the same metrics but for time."""
    both = [load_params(find_model(one / "reward" / "model")) for one in (found, expected)]
    for left, right in zip(*map(jax.tree.leaves, both), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
    rows = [
        [
            {name: value for name, value in row.items() if not is_time_field(name)}
            for row in read_rows(one / "reward" / "metrics.jsonl")
        ]
        for one in (found, expected)
    ]
    assert rows[0] == rows[1]
    for name in ("reward_report.json", "model/reward_normalization.json"):
        assert (found / "reward" / name).read_bytes() == (expected / "reward" / name).read_bytes()


def test_a_finished_stage_is_not_run_again_and_its_settings_stand(trained, files):
    workdir, result = trained
    assert run_reward(_config(files), workdir) == result
    with pytest.raises(ValueError, match="margin_scale: saved 0.2, now 0.0"):
        run_reward(_config(files, margin_scale=0.0), workdir)
    config = replaced(_config(files), {"micro_batch_size": 4, "loop.evaluate_every": 7})
    assert run_reward(config, workdir) == result


@pytest.fixture(scope="module")
def sft_model(tmp_path_factory):
    """A language model's directory, as the SFT stage leaves it."""
    folder = tmp_path_factory.mktemp("sft") / "sft" / "model"
    params = init_params(jax.random.key(5), BACKBONE, ComputeSection().compute_config())
    save_orbax(params, BACKBONE, folder, head="lm", source_folder=pathlib.Path(TOKENIZER))
    return folder


@pytest.mark.slow
def test_adapters_are_trained_with_the_head_on_an_sft_model_and_merged(files, sft_model, tmp_path):
    # Found by the mark of the run's folder, as the stage before leaves it.
    (tmp_path / "sft").symlink_to(sft_model.parent)
    model = {"directory": "{workdir}/sft/model", "lora": LoraConfig(rank=4, alpha=8.0)}
    run_reward(_config(files, model=model, num_steps=2), tmp_path)
    before = load_params(find_model(sft_model))
    after = load_params(find_model(tmp_path / "reward" / "model"))
    assert "lm_head" in before and set(after) == set(before) - {"lm_head"} | {"score_head"}
    np.testing.assert_array_equal(before["embedding"]["table"], after["embedding"]["table"])
    kernels = [tree["layers"]["attention"]["qkv"]["kernel"] for tree in (before, after)]
    assert not np.array_equal(*kernels)


def test_only_the_head_is_trained_where_the_backbone_is_frozen(files, sft_model, tmp_path):
    model = {"directory": str(sft_model)}
    run_reward(_config(files, model=model, num_steps=2, head_only=True), tmp_path)
    before = load_params(find_model(sft_model))
    after = load_params(find_model(tmp_path / "reward" / "model"))
    after.pop("score_head")
    before.pop("lm_head")
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_fresh_head_gives_small_scores_and_a_trained_one_is_kept(trained, sft_model):
    mesh = sharding.make_mesh()
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), num_steps=3)

    def head(directory):
        section, compute = ModelConfig(directory=str(directory)), ComputeSection().compute_config()
        model = open_model(section, compute, head="score", head_init=0.01)
        state = model.make_state(jax.random.key(0), optimizer, mesh)
        return np.asarray(state.variables["params"]["score_head"]["kernel"])

    assert np.linalg.norm(head(sft_model)) == pytest.approx(0.01, rel=0.4)
    reward = trained[0] / "reward" / "model"
    kept = load_params(find_model(reward))["score_head"]["kernel"]
    np.testing.assert_array_equal(head(reward), kept)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("learning_rate", 1.0, "RewardConfig has no field 'learning_rate'"),
        ("micro_batch_size", 3, "micro_batch_size=3 must divide batch_size=8"),
        ("mesh.tensor", 2, "mesh.fsdp=-1: the other axes take 2 devices"),
        ("data.max_length", 200, "row_length=256 must be at least twice max_length=200"),
        ("centring", -1.0, "centring=-1.0 must be 0 or more"),
        ("denominator", "tokens", "denominator='tokens' must be one of"),
        ("data.template", "alpaca", "template: 'alpaca' is not known"),
        ("head_init", 0.0, "head_init=0.0 must be above 0"),
        ("normalization_answers", "nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_a_wrong_setting_ends_in_one_clear_message(files, tmp_path, path, value, message):
    with pytest.raises(ValueError, match=message):
        run_reward(replaced(_config(files), {path: value}), tmp_path)
    assert not (tmp_path / "reward" / "metrics.jsonl").exists()


def test_the_default_config_holds_the_sample_and_the_stages():
    sys.path.insert(0, str(ROOT / "configs"))
    try:
        import reward
    finally:
        sys.path.pop(0)
    config = reward.get_config()
    assert config.stages == ("sft", "reward")
    assert all(
        pathlib.Path(one.paths[0]).parent == SAMPLE_FOLDER for one in config.reward.data.sources
    )
    config = reward.get_config("some/model,mine.jsonl")
    assert config.stages == ("reward",) and config.reward.model.directory == "some/model"
    assert [one.paths for one in config.reward.data.sources] == [("mine.jsonl",)]


def _launch(workdir, *arguments, **options):
    # One device: the same arithmetic in every process.
    environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu", XLA_FLAGS="")
    command = [sys.executable, "launch/train.py", "--config=configs/reward.py"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_the_command_runs_the_default_config_and_survives_kills(tmp_path):
    short = (
        "--config.sft.num_steps=4",
        "--config.reward.num_steps=12",
        "--config.reward.loop.checkpoint_every=2",
        "--config.reward.loop.evaluate_every=4",
    )
    unbroken = _launch(tmp_path / "unbroken", *short)
    output, _ = unbroken.communicate(timeout=900)
    assert unbroken.returncode == 0, output
    assert "reward: finished in" in output and "report/accuracy" in output
    checkpoints = tmp_path / "killed" / "reward" / "checkpoints"
    for kill_at in (2, 6):
        process = _launch(tmp_path / "killed", *short)
        while not (checkpoints / str(kill_at)).is_dir():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.kill()
        process.communicate()
    last = _launch(tmp_path / "killed", *short)
    output, _ = last.communicate(timeout=900)
    assert last.returncode == 0 and "resumes from the checkpoint" in output, output
    _assert_same(tmp_path / "killed", tmp_path / "unbroken")
