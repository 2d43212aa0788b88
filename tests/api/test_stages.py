"""The stages as functions on data in memory: each leaves a model that the next one takes."""

import json
import pathlib

import pytest

import huatuo_jax as hj
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.python_data import as_file
from huatuo_jax.generation.samples import read_samples
from huatuo_jax.ppo.config import PpoLoopConfig, RolloutConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.metrics import read_rows
from huatuo_jax.training.optimizer import OptimizerConfig
from tests.api import tiny
from tests.recipe.tiny import tiny_recipe, write_dialogues

LOOP = LoopConfig(evaluate_every=2, checkpoint_every=2, tensorboard=False)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2)
SHORT = {"num_steps": 2, "batch_size": 2, "optimizer": OPTIMIZER, "loop": LOOP}
SHARED = ("sft", "reward")
FRESH = ModelConfig(backbone=tiny.BACKBONE, tokenizer=str(tiny.TOKENIZER))
DIALOGUES = [
    {"question": f"咳嗽{day}天了，怎么办？", "answer": f"先多喝水，第{day}天来复查。"}
    for day in range(1, 13)
]
COMPARISONS = [
    {
        "messages": [{"role": "user", "content": row["question"]}],
        "chosen": row["answer"],
        "rejected": "没事。",
    }
    for row in DIALOGUES
]
PROMPTS = [row["question"] for row in DIALOGUES[:4]]

pytestmark = pytest.mark.usefixtures("on_one_device")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def run_sft(workdir, **changed):
    return hj.sft(FRESH, DIALOGUES, workdir=workdir, held_out_share=0.25, **(SHORT | changed))


@pytest.fixture(scope="module")
def policy(on_one_device, workdir):
    return run_sft(workdir)


def run_reward(policy, workdir):
    return hj.train_reward_model(policy, COMPARISONS, workdir=workdir, held_out_share=0.25, **SHORT)


@pytest.fixture(scope="module")
def reward(policy, workdir):
    return run_reward(policy, workdir)


def run_ppo(policy, reward, workdir, **changed):
    fields = {
        "prompts": PROMPTS,
        "num_iterations": 2,
        "num_epochs": 1,
        "rollout": RolloutConfig(num_prompts=4, max_new_tokens=6),
        "loop": PpoLoopConfig(tensorboard=False, samples_per_iteration=4),
    }
    return hj.ppo(policy, reward=reward, workdir=workdir, **(fields | changed))


def test_a_fine_tuned_model_answers(policy, workdir):
    assert policy.folder == workdir / "sft" / "model" and policy.result["step"] == 2
    text = policy.chat(tiny.QUESTION, max_new_tokens=6)
    assert hj.load_model(policy.folder).chat(tiny.QUESTION, max_new_tokens=6) == text
    assert policy.template.name == "huatuogpt"


def test_a_second_identical_call_finds_the_stage_done(policy, workdir):
    metrics = workdir / "sft" / "metrics.jsonl"
    before = metrics.read_bytes()
    again = run_sft(workdir)
    assert again.result == policy.result and metrics.read_bytes() == before
    with pytest.raises(ValueError, match="begun with other settings(.|\n)*num_steps"):
        run_sft(workdir, num_steps=3)


def test_other_data_in_a_workdir_is_refused(policy, workdir):
    with pytest.raises(ValueError, match="begun with other settings(.|\n)*dialogues"):
        hj.sft(FRESH, DIALOGUES[:8], workdir=workdir, held_out_share=0.25, **SHORT)


def test_a_trained_reward_model_scores(reward, policy, workdir):
    assert reward.folder == workdir / "reward" / "model"
    assert reward.normalization is not None
    score = reward.score(tiny.QUESTION, "先多喝水。")
    assert hj.load_reward_model(reward.folder).score(tiny.QUESTION, "先多喝水。") == score
    assert run_reward(policy, workdir).result == reward.result
    settings = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    shares = [settings[stage]["settings"]["data"]["held_out"]["share"] for stage in SHARED]
    assert shares == [0.25, 0.25]


@pytest.mark.slow
def test_dpo_on_the_same_comparisons_leaves_a_model_that_answers(policy, workdir):
    def run():
        fields = {"beta": 0.2, "held_out_share": 0.25, **SHORT}
        return hj.dpo(policy.folder, COMPARISONS, workdir=workdir, **fields)

    model = run()
    assert model.result["step"] == 2 and isinstance(model.chat("咳嗽", max_new_tokens=4), str)
    assert run().result == model.result


def test_ppo_takes_prompts_as_a_list_and_a_reward_model(policy, reward, workdir):
    model = run_ppo(policy, reward, workdir)
    rows = read_samples(workdir / "ppo" / "samples.jsonl")
    assert {row["step"] for row in rows} == {1, 2}
    assert len({row["id"] for row in rows}) == len(PROMPTS)
    assert isinstance(model.chat(PROMPTS[0], max_new_tokens=4), str)
    before = read_rows(workdir / "ppo" / "metrics.jsonl")
    assert run_ppo(policy, reward, workdir).result == model.result
    assert read_rows(workdir / "ppo" / "metrics.jsonl") == before


def test_files_and_sections_are_taken_as_they_are(policy, workdir, tmp_path):
    path = as_file(DIALOGUES, workdir, "dialogues")
    sources = (SourceConfig(name="data", paths=(path,)),)
    data = DataConfig(sources=sources, row_length=256, held_out=HeldOutConfig(share=0.25))
    # The same content by another way: the stage is done.
    assert hj.sft(FRESH, data, workdir=workdir, **SHORT).result == policy.result
    for given in (path, pathlib.Path(path)):
        model = hj.sft(FRESH, given, workdir=workdir, held_out_share=0.25, **SHORT)
        assert model.result == policy.result
    with pytest.raises(ValueError, match="^template, max_length: say this in the section"):
        hj.sft(FRESH, data, workdir=workdir, template="chatml", max_length=8, **SHORT)
    prompts = PromptsConfig(paths=("none",))
    with pytest.raises(ValueError, match="^max_prompt_tokens: say this in the section"):
        run_ppo(policy, "none", tmp_path, prompts=prompts, max_prompt_tokens=3)


def test_what_cannot_be_trained_ends_in_one_clear_message(policy, tmp_path):
    with pytest.raises(ValueError, match="^dialogues is empty"):
        hj.sft(policy, [], workdir=tmp_path)
    with pytest.raises(ValueError, match="none is no model: "):
        hj.sft(tmp_path / "none", DIALOGUES, workdir=tmp_path)
    scores = tiny.save(tmp_path / "reward_model", "score")
    with pytest.raises(ValueError, match="reward_model: this model scores; a policy needs a token"):
        hj.sft(scores, DIALOGUES, workdir=tmp_path)
    with pytest.raises(ValueError, match="no such folder, and not available from the Hu"):
        run_ppo(policy, "none", tmp_path / "other")
    with pytest.raises(ValueError, match=r"^comparisons\[0\] is a str"):
        hj.dpo(policy, ["a"], workdir=tmp_path)
    with pytest.raises(ValueError, match=r"^prompts\[1\]: turn 1 \(user\) is empty"):
        run_ppo(policy, "none", tmp_path, prompts=["a", ""])
    with pytest.raises(ValueError, match="max_new_tokens=256 leaves no room for a prompt"):
        run_ppo(policy, "none", tmp_path, rollout=RolloutConfig(num_prompts=4))
    assert not (tmp_path / "sft").exists() and not (tmp_path / "ppo").exists()


@pytest.mark.slow
def test_the_recipe_runs_from_its_config(tmp_path):
    write_dialogues(tmp_path / "mine.jsonl")
    figures = hj.run_recipe(tiny_recipe(tmp_path / "mine.jsonl"), tmp_path / "run")
    assert figures["released"] and hj.load_model(tmp_path / "run" / "export" / "policy")
