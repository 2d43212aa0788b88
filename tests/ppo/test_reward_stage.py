"""A whole stage with a reward of several terms: files in, metrics, samples and a model out."""

import dataclasses
import json

import jax
import pytest

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint.models import save_orbax
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.ppo.config import PpoLoopConfig, RolloutConfig, ScoreConfig, ValueConfig
from huatuo_jax.ppo.held_out_config import HeldOutRewardsConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.ppo.ptx import PtxConfig
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.ppo.stage import run_ppo
from huatuo_jax.reward_functions.grader import GraderConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.metrics import read_rows
from tests.ppo.test_stage import BACKBONE, TOKENIZER, _config, files

assert files  # The fixture.
pytestmark = pytest.mark.usefixtures("on_one_device")

SOURCE = """
def characters(prompts, responses, *, dose, **columns):
    assert prompts[0][-1]["role"] == "user"
    return [None if one is None else len(text) / one for text, one in zip(responses, dose)]
"""


def _prompts(folder, name, first):
    rows = [
        {
            "id": f"{name}{index}",
            "messages": [{"role": "user", "content": f"第{first + index}天还咳嗽。"}],
            "source": "test",
            "reference": "感冒",
            "dose": None if index == 1 else 10,
        }
        for index in range(4)
    ]
    path = folder / f"{name}.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return str(path)


def _mixed(files, tmp_path, **changed):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    terms = (
        RewardTerm(of=f"{path}:characters"),
        RewardTerm(of="huatuo_jax.reward_functions.verifiers:medical_o1", weight=0.5),
        RewardTerm(
            of="huatuo_jax.reward_functions.lengths:over_free_tokens",
            adjusts=True,
            settings={"free_tokens": 2, "span": 10},
        ),
    )
    settings = {
        "reward": RewardMixConfig(terms=terms),
        "reward_model": str(tmp_path / "there is none"),
        "data": PromptsConfig(paths=(_prompts(tmp_path, "p", 0),), max_prompt_tokens=64),
        "score": ScoreConfig(scale="running", penalty=0.5),
        "value": ValueConfig(start="policy"),
        "rollout": RolloutConfig(num_prompts=4, max_new_tokens=6),
        "held_out_rewards": HeldOutRewardsConfig(
            prompts=_prompts(tmp_path, "h", 50), every=1, num_prompts=2, measure="characters"
        ),
        "loop": PpoLoopConfig(tensorboard=False, samples_per_iteration=4),
    }
    return _config(files, **(settings | changed))


def test_a_run_without_a_reward_model_is_rewarded_by_functions(files, tmp_path):
    cfg = _mixed(files, tmp_path)
    result = run_ppo(cfg, tmp_path / "run")
    assert result["step"] == 2 and result["kept_iteration"] in (1, 2)
    assert (tmp_path / "run" / "ppo" / "model").is_dir()
    rows = list(read_rows(tmp_path / "run" / "ppo" / "metrics.jsonl"))
    steps = [row for row in rows if "ppo/score" in row]
    assert [row["ppo/reward/characters/without"] for row in steps] == [0.25, 0.25]
    assert all(row["ppo/without_reward"] == 0 for row in steps)
    assert len([row for row in rows if "eval/measure" in row]) == 3
    samples = list(read_rows(tmp_path / "run" / "ppo" / "samples.jsonl"))
    for sample in samples:
        rewards = sample["rewards"]
        assert (rewards["characters"] is None) == (sample["id"] == "p1")
        assert rewards["medical_o1"] == 0.0
        expected = (rewards["characters"] or 0.0) + rewards["over_free_tokens"]
        assert sample["score"] == pytest.approx(expected, rel=1e-5)


def test_another_function_of_the_same_name_is_another_run(files, tmp_path):
    cfg = _mixed(files, tmp_path, num_iterations=1)
    run_ppo(cfg, tmp_path / "run")
    (tmp_path / "mine.py").write_text(SOURCE.replace("/ one", "/ 2"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"reward_functions\.characters"):
        run_ppo(cfg, tmp_path / "run")


def _with_dialogues(files, tmp_path, *, row_length):
    path = tmp_path / "dialogues.jsonl"
    rows = [{"question": f"咳嗽{n}天了？", "answer": f"多喝水，{n}天复查。"} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(
        sources=(SourceConfig(name="mine", paths=(str(path),)),),
        row_length=row_length,
        held_out=HeldOutConfig(share=0.0),
    )
    ptx = PtxConfig(data=data, coef=1.0, batch_size=2)
    return _mixed(files, tmp_path, ptx=ptx, held_out_rewards=None)


@pytest.mark.slow
def test_dialogues_are_trained_on_beside_the_reward(files, tmp_path):
    run_ppo(_with_dialogues(files, tmp_path, row_length=64), tmp_path / "run")
    steps = list(read_rows(tmp_path / "run" / "ppo" / "metrics.jsonl"))
    assert steps[1]["ppo/ptx_loss"] < steps[0]["ppo/ptx_loss"]


def test_dialogues_in_rows_that_the_model_cannot_read_are_refused(files, tmp_path):
    cfg = _with_dialogues(files, tmp_path, row_length=129)
    with pytest.raises(
        ValueError, match=r"ptx\.data\.row_length=129 must be at most the model's 128"
    ):
        run_ppo(cfg, tmp_path / "run")


@pytest.mark.parametrize(
    ("of", "fields", "message"),
    [
        ("graded:verified", {"grader": GraderConfig()}, "asks questions, and the offline judge"),
        (
            "verifiers:medical_o1",
            {"grader": GraderConfig()},
            r"config\.ppo\.reward\.grader has no use: no function of the terms takes a grader",
        ),
        (
            "graded:classified",
            {"verifier_model": "{workdir}/none"},
            "none",
        ),
    ],
)
def test_graders_that_do_not_fit_end_in_one_line_before_anything_is_compiled(
    files, tmp_path, of, fields, message
):
    term = RewardTerm(of=f"huatuo_jax.reward_functions.{of}")
    mix = RewardMixConfig(terms=(term,), **fields)
    cfg = _mixed(files, tmp_path, reward=mix, held_out_rewards=None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_ppo(cfg, tmp_path / "run")


def test_the_offline_judge_and_a_model_that_classifies_reward_a_run(files, tmp_path):
    """The classifier has random weights: its verdicts mean nothing."""
    wide = dataclasses.replace(BACKBONE, max_positions=1024)
    params = init_params(jax.random.key(4), wide, ComputeConfig(), head="score")
    verifier = tmp_path / "verifier"
    save_orbax(params, wide, verifier, head="score", source_folder=TOKENIZER)
    terms = tuple(
        RewardTerm(of=f"huatuo_jax.reward_functions.graded:{name}", settings=settings)
        for name, settings in (("judged", {}), ("classified", {"form": "any"}))
    )
    mix = RewardMixConfig(terms=terms, grader=GraderConfig(), verifier_model=str(verifier))
    cfg = _mixed(files, tmp_path, reward=mix, held_out_rewards=None)
    run_ppo(cfg, tmp_path / "run")
    for sample in read_rows(tmp_path / "run" / "ppo" / "samples.jsonl"):
        assert 0 <= sample["rewards"]["judged"] <= 1
        assert sample["rewards"]["classified"] in (pytest.approx(0.1), 1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"of": "nowhere_at_all:fn"}, "nowhere_at_all cannot be imported"),
        (
            {"of": "huatuo_jax.reward_functions.graded:judged"},
            r"needs config\.ppo\.reward\.grader, which is None",
        ),
        (
            {"of": "huatuo_jax.evaluation.choice_reward:multiple_choice"},
            "needs options, answer, which neither",
        ),
        (
            {
                "of": "huatuo_jax.reward_functions.verifiers:medical_o1",
                "settings": {"wrogn": 0.2, "reference": "x"},
            },
            "settings reference must have other names than the columns",
        ),
    ],
)
def test_a_function_that_does_not_fit_ends_in_one_line_before_anything_is_compiled(
    files, tmp_path, changed, message
):
    cfg = _mixed(
        files,
        tmp_path,
        reward=RewardMixConfig(terms=(RewardTerm(**changed),)),
        held_out_rewards=None,
    )
    with pytest.raises(ValueError, match=message):
        run_ppo(cfg, tmp_path / "run")
