"""The PPO stage from config to model directory: what it writes, and what it refuses."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.checkpoint.models import find_model, load_params, save_orbax
from huatuo_jax.core import sharding
from huatuo_jax.core.config import replaced
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.chat import templates
from huatuo_jax.data.records import Message
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.generation.engine import Engine
from huatuo_jax.generation.requests import Request, SamplingConfig
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.ppo.config import (
    JudgingConfig,
    PpoConfig,
    PpoLoopConfig,
    RolloutConfig,
    ScoreConfig,
    ValueConfig,
)
from huatuo_jax.ppo.models import open_critic, open_reward_model
from huatuo_jax.ppo.prompts import PromptsConfig, open_prompts
from huatuo_jax.ppo.roles import abstract_roles, critic_of, micro_batch_programs
from huatuo_jax.ppo.stage import run_ppo
from huatuo_jax.ppo.trainer import NUMBERS_OF_TOKENS
from huatuo_jax.reward.score_file import ScoreConfig as FileScoreConfig
from huatuo_jax.reward.score_file import score_file
from huatuo_jax.training.initial_model import ModelConfig, open_model
from huatuo_jax.training.metrics import read_rows
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.scoring import GivenAnswer, Normalization, Scorer, save_normalization
from tests import made_up_memory
from tests.judge.planted_server import KEY, MODEL, Planted, PlantedServer
from tests.tiny import backbone

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = SAMPLE_FOLDER / "tokenizer"
BACKBONE = backbone(max_positions=128)
NORMALIZATION = Normalization(mean=0.2, standard_deviation=0.5, num_answers=9, answers="nine")

# Runs here are on one device, which is quick; `test_update` shows that meshes agree.
pytestmark = pytest.mark.usefixtures("on_one_device")


def _save(folder, head, seed):
    params = init_params(jax.random.key(seed), BACKBONE, ComputeConfig(), head=head)
    save_orbax(params, BACKBONE, folder, head=head, source_folder=TOKENIZER)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An SFT model, a reward model, and a file of prompts."""
    folder = tmp_path_factory.mktemp("files")
    _save(folder / "sft", "lm", 1)
    _save(folder / "reward", "score", 2)
    save_normalization(folder / "reward", NORMALIZATION)
    _save(folder / "unnormalized", "score", 3)
    rows = [
        {"id": f"p{index}", "messages": [{"role": "user", "content": f"第{index}天还咳嗽。"}]}
        for index in range(6)
    ]
    rows[2]["messages"] += [
        {"role": "assistant", "content": "发烧吗？"},
        {"role": "user", "content": "没有。"},
    ]
    text = "".join(json.dumps(row | {"source": "test"}, ensure_ascii=False) + "\n" for row in rows)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    return folder


def _config(files, **changed):
    settings = {
        "model": ModelConfig(directory=str(files / "sft")),
        "reward_model": str(files / "reward"),
        "data": PromptsConfig(paths=(str(files / "prompts.jsonl"),), max_prompt_tokens=64),
        "optimizer": OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
        "value": ValueConfig(),
        "rollout": RolloutConfig(num_prompts=4, max_new_tokens=6),
        "score": ScoreConfig(penalty=0.5),
        "num_iterations": 2,
        "num_epochs": 1,
        "num_minibatches": 2,
        "loop": PpoLoopConfig(tensorboard=False, samples_per_iteration=3),
    }
    return PpoConfig(**(settings | changed))


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, run_ppo(_config(files), workdir)


def test_a_run_leaves_metrics_samples_and_a_model(trained, files):
    workdir, result = trained
    folder = workdir / "ppo"
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for part in ("generation", "scoring", "log_probs", "update"):
        assert rows[1][f"throughput/{part}_s"] > 0
    assert 0 < rows[1]["throughput/generation_share"] < 1
    assert rows[1]["throughput/tokens_per_s"] > 0
    assert result["step"] == 2 and result["ppo/score"] == rows[1]["ppo/score"]
    assert json.loads((folder / "finished.json").read_text()) == result
    account = json.loads((folder / "data.json").read_text())
    assert account["rows"] == 6 and account["used"] == {"to train on": 6}
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [one["step"] for one in samples] == [1, 1, 1, 2, 2, 2]
    assert all(one["kl"] == 0.0 for one in samples[:3])
    assert any(one["kl"] != 0.0 for one in samples[3:])
    before, after = (load_params(find_model(path)) for path in (files / "sft", folder / "model"))
    assert set(after) == set(before) and find_model(folder / "model").head == "lm"
    assert not np.array_equal(after["lm_head"]["kernel"], before["lm_head"]["kernel"])
    assert load_tokenizer(folder / "model").get_vocab() == load_tokenizer(TOKENIZER).get_vocab()


def test_the_score_is_the_reward_models_on_the_ids_that_were_sampled(trained, files):
    workdir, _ = trained
    lines = (workdir / "ppo" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    model = find_model(files / "reward")
    template, tokenizer = templates.by_name("huatuogpt"), load_tokenizer(TOKENIZER)
    texts = {f"p{index}": (Message("user", f"第{index}天还咳嗽。"),) for index in (0, 1, 3, 4, 5)}
    shown = next(one for one in map(json.loads, lines) if one["id"] in texts)
    prompt = template.prompt(texts[shown["id"]], tokenizer)
    assert shown["prompt"] and shown["length"] <= 6
    scorer = Scorer(
        Transformer(BACKBONE, ComputeConfig()),
        {"params": load_params(model)},
        mesh=sharding.make_mesh(),
        rows_at_once=1,
    )
    # The text alone does not tell the ids; those that were sampled are asked of the engine again.
    ids = _sampled_again(files, prompt, shown)
    score = scorer.scores([GivenAnswer(np.array([*prompt, *ids], np.int32), len(prompt))])[0]
    assert shown["score"] == pytest.approx(score, abs=1e-5)
    penalty = 0.0 if shown["finish_reason"] == "stop" else 0.5
    normalized = NORMALIZATION.apply(shown["score"]) - penalty
    assert shown["answer_score"] == pytest.approx(normalized, abs=1e-4)


@pytest.mark.slow
def test_a_run_by_length_alone_scores_nothing_else(files, tmp_path):
    run_ppo(_config(files, score=ScoreConfig(of="length", scale="running", penalty=0.5)), tmp_path)
    lines = (tmp_path / "ppo" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    assert samples and all(one["score"] == one["length"] for one in samples)


def _sampled_again(files, prompt, shown):
    """The answer's ids, by the engine alone."""
    cfg = PpoConfig(
        model=ModelConfig(directory=str(files / "sft")),
        data=PromptsConfig(paths=(str(files / "prompts.jsonl"),), max_prompt_tokens=64),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    tokenizer = load_tokenizer(TOKENIZER)
    stops = (tokenizer.eos_token_id,)
    prompts = open_prompts(cfg.data, tokenizer, max_new_tokens=6, stop_token_ids=stops)
    row = [one.id for one in prompts.rows(0, 4, seed=0)].index(shown["id"])
    key = jax.random.fold_in(jax.random.key(0), 0)
    seed = int(jax.random.bits(key, (4,), "uint32")[row])
    engine = Engine(
        Transformer(BACKBONE, ComputeConfig()),
        {"params": load_params(find_model(files / "sft"))},
        slots=1,
        max_length=70,
    )
    sampling = SamplingConfig(max_new_tokens=6, stop_token_ids=prompts.stop_token_ids)
    request = Request(prompt_token_ids=prompt, sampling=sampling, seed=seed)
    ((answer,),) = engine.generate_in_order([request])
    assert len(answer.token_ids) == shown["length"]
    return answer.token_ids


def test_a_finished_stage_is_not_run_again_and_its_settings_stand(trained, files):
    workdir, result = trained
    assert run_ppo(_config(files), workdir) == result
    with pytest.raises(ValueError, match="kl_coef: saved 0.03, now 0.2"):
        run_ppo(_config(files, kl_coef=0.2), workdir)
    assert run_ppo(_config(files, micro_batch_size=1), workdir) == result


@pytest.mark.slow
def test_auto_takes_the_most_rows_that_fit_and_changes_no_number(
    files, tmp_path, monkeypatch, capsys
):
    config = _config(files, num_minibatches=1, num_iterations=1)
    policy = open_model(config.model, config.compute.compute_config())
    tokenizer = load_tokenizer(TOKENIZER)
    reward = open_reward_model(
        config.reward_model, scale="stored", max_length=config.max_length, tokenizer=tokenizer
    )
    critic = open_critic(config, policy, reward)
    mesh = config.mesh.make()

    def programs(size):
        cfg = dataclasses.replace(config, micro_batch_size=size)
        roles = abstract_roles(
            cfg, policy=policy, critic=critic, rewarding=reward.info.cfg, mesh=mesh
        )
        return micro_batch_programs(roles)

    names = [one.name for one in programs(4)]
    assert names == ["ppo/policy_pass", "ppo/value_pass", "ppo/score"]
    run_ppo(config, tmp_path / "whole")
    made_up_memory.make_up(monkeypatch, programs_of=programs, fits=1, too_large=2)
    capsys.readouterr()
    run_ppo(config, tmp_path / "auto")
    assert made_up_memory.told("ppo", size=1, rows=4) in capsys.readouterr().err
    found, expected = (
        {
            name: value
            for name, value in read_rows(tmp_path / run / "ppo" / "metrics.jsonl")[0].items()
            if name.startswith("ppo/")
        }
        for run in ("auto", "whole")
    )
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


WAYS = {
    "shared trunk": {
        "model": {"lora": LoraConfig(rank=2, alpha=4.0)},
        "value": ValueConfig(start="shared", lora=LoraConfig(rank=2, alpha=4.0)),
    },
    "reward model's head and adapters": {
        "value": ValueConfig(head="keep", lora=LoraConfig(rank=2, alpha=4.0)),
        "score": ScoreConfig(on_truncation="bootstrap", penalty=None),
    },
    "policy's copy": {
        "value": ValueConfig(start="policy", warmup_iterations=1),
        "micro_batch_size": 1,
        "kl_in": "k3",
        "stop_at_kl": 0.05,
        "score": ScoreConfig(penalty=0.5, scale="running", whiten=True),
    },
    "rloo": {
        "estimator": "rloo",
        "rollout": RolloutConfig(num_prompts=2, answers_per_prompt=2, max_new_tokens=6),
        "kl_in": "sequence_square",
    },
    "grpo": {
        "estimator": "grpo",
        "rollout": RolloutConfig(num_prompts=2, answers_per_prompt=2, max_new_tokens=6),
        "entropy_coef": 0.01,
        "denominator": "answers",
        "score": ScoreConfig(scale="raw"),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_way_to_make_the_roles_runs(files, tmp_path, way):
    way = dict(way)
    model = ModelConfig(directory=str(files / "sft"), **way.pop("model", {}))
    result = run_ppo(_config(files, model=model, **way), tmp_path)
    assert result["step"] == 2
    rows = read_rows(tmp_path / "ppo" / "metrics.jsonl")
    assert rows[0]["ppo/kl_per_sequence"] == 0.0
    assert ("ppo/explained_variance" in rows[1]) == ("estimator" not in way)
    trained_rows = [row for row in rows if "ppo/first_minibatch/ratio" in row]
    assert all(row["ppo/first_minibatch/ratio"] == 1.0 for row in trained_rows)
    assert len(trained_rows) == (1 if "stop_at_kl" in way else 2)  # One warms the critic up.
    if "stop_at_kl" in way:
        assert rows[1]["ppo/kl_per_sequence"] == 0.0 and "ppo/policy_loss" not in rows[0]
    after = load_params(find_model(tmp_path / "ppo" / "model"))
    before = load_params(find_model(files / "sft"))
    kernels = [tree["layers"]["attention"]["qkv"]["kernel"] for tree in (before, after)]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("scale", ["stored", pytest.param("raw", marks=pytest.mark.slow)])
def test_a_kept_head_gives_the_scores_as_they_enter_the_reward(files, scale):
    cfg = _config(files, value=ValueConfig(head="keep"), score=ScoreConfig(scale=scale))
    policy = open_model(cfg.model, cfg.compute.compute_config())
    reward = open_reward_model(
        cfg.reward_model,
        scale=scale,
        max_length=cfg.max_length,
        tokenizer=load_tokenizer(TOKENIZER),
    )
    critic = open_critic(cfg, policy, reward)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    valued = critic_of(cfg, critic, mesh)
    state = critic.make_state(jax.random.key(0), valued.optimizer, mesh)
    draw = np.random.default_rng(0)
    answers = [
        GivenAnswer(draw.integers(3, 2000, length).astype(np.int32), 2) for length in (5, 9, 9, 3)
    ]
    scorer = reward.make_scorer(policy.compute, mesh, rows_at_once=4, row_length=16)
    raw_N = scorer.scores(answers)
    expected_N = NORMALIZATION.apply(raw_N) if scale == "stored" else raw_N
    rows = {
        "token_ids": np.zeros((4, 16), np.int32),
        "segment_ids": np.zeros((4, 16), np.int32),
        "answers": np.zeros((4, 16), np.int32),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16)),
    }
    for row, one in enumerate(answers):
        rows["token_ids"][row, : len(one.token_ids)] = one.token_ids
        rows["segment_ids"][row, : len(one.token_ids)] = 1
    rows["mask"] = rows["segment_ids"] > 0
    rows |= dict.fromkeys(NUMBERS_OF_TOKENS, np.zeros((4, 16), np.float32))
    found = valued.learner.run_pass(
        state.trained,
        critic.frozen(state.frozen, {}),
        sharding.put_whole(rows, mesh),
        jax.numpy.float32(0.0),
        False,
    )
    last_N = [len(one.token_ids) - 1 for one in answers]
    after_N = np.asarray(found.outputs["values_after"])[range(4), last_N]
    assert np.ptp(after_N) > 0.1
    np.testing.assert_allclose(after_N, expected_N, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def held_out(files):
    """Prompts with references that no stage trains on."""
    rows = [
        {
            "id": f"q{index}",
            "messages": [{"role": "user", "content": f"头痛{index}天，怎么办？"}],
            "reference": "多喝水，注意休息。",
            "source": "test",
        }
        for index in range(5)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (files / "held_out.jsonl").write_text(text, encoding="utf-8")
    return str(files / "held_out.jsonl")


def test_a_stage_that_judges_keeps_the_best_policy_and_says_which(files, held_out, tmp_path):
    """By the offline rubric; two of the held-out prompts, two answers each."""
    judging = JudgingConfig(
        every=1, prompts=held_out, num_prompts=2, num_samples=2, judge=JudgeConfig()
    )
    loop = PpoLoopConfig(tensorboard=False, keep_checkpoints=9)
    config = _config(files, judging=judging, num_iterations=3, loop=loop)
    result = run_ppo(config, tmp_path)
    folder = tmp_path / "ppo"
    assert result["step"] == 3 and result["ended"] == "all iterations"
    rows = {row["step"]: row for row in read_rows(folder / "metrics.jsonl") if _is_judged(row)}
    assert list(rows) == [0, 1, 2, 3] and rows[3]["judged/pairs"] == 4
    best = max((1, 2, 3), key=lambda step: (rows[step]["judged/share"], -step))
    assert result["kept_iteration"] == best and result["kept_share"] == rows[best]["judged/share"]
    assert json.loads((folder / "finished.json").read_text()) == result
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.restore(folder / "checkpoints" / str(best) / "state")
    trained = found["policy"]["trained"]["params"]["lm_head"]["kernel"]
    kept = load_params(find_model(folder / "model"))["lm_head"]["kernel"]
    assert np.asarray(trained).tobytes() == np.asarray(kept).tobytes()
    # The rewards are those that the scores of a file would have by PPO's rule.
    path = folder / "judged" / str(best) / "answers.jsonl"
    score_file(
        FileScoreConfig(
            model=str(files / "reward"),
            input=str(path),
            output=str(tmp_path / "scored.jsonl"),
            rule=ScoreConfig(penalty=0.5).outside_training,
        )
    )
    lines = (tmp_path / "scored.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    assert len({record["messages"][0]["content"] for record in records}) == 2
    rewards = [record["rewards"][1] for record in records]
    assert rows[best]["judged/reward"] == pytest.approx(np.mean(rewards), abs=1e-4)
    assert run_ppo(config, tmp_path) == result
    server = dataclasses.replace(judging, judge=JudgeConfig(base_url="http://host/v1"))
    with pytest.raises(ValueError, match="judged_by_server: saved false, now true"):
        run_ppo(_config(files, judging=server, num_iterations=3, loop=loop), tmp_path)
    with pytest.raises(ValueError, match="judging.num_samples: saved 2, now 1"):
        changed = dataclasses.replace(judging, num_samples=1)
        run_ppo(_config(files, judging=changed, num_iterations=3, loop=loop), tmp_path)


def _is_judged(row):
    return "judged/share" in row


@pytest.mark.slow
def test_adapters_are_judged_against_the_model_without_them(files, held_out, tmp_path):
    """The initial answers that were deleted come back from the reference, token by token."""
    judging = JudgingConfig(every=1, prompts=held_out, judge=JudgeConfig())
    model = ModelConfig(directory=str(files / "sft"), lora=LoraConfig(rank=2, alpha=4.0))
    optimizer = OptimizerConfig(learning_rate=1e-1, weight_decay=0.0)
    config = _config(files, judging=judging, model=model, optimizer=optimizer, num_iterations=3)
    run_ppo(config, tmp_path)
    folder = tmp_path / "ppo"
    rows = {row["step"]: row for row in read_rows(folder / "metrics.jsonl") if _is_judged(row)}
    assert rows[0]["judged/kl_per_sequence"] == 0.0 != rows[3]["judged/kl_per_sequence"]
    initial = folder / "judged" / "0" / "answers.jsonl"
    before = initial.read_bytes()
    for name in ("judged/0/answers.jsonl", "judged/3/answers.jsonl", "judged/3/outcome.json"):
        (folder / name).unlink()
    (folder / "finished.json").unlink()
    run_ppo(config, tmp_path)
    assert initial.read_bytes() == before


WRONG_JUDGINGS = {
    "no judge": ({"judge": None}, r"config.ppo.judging.judge=None must be named"),
    "no prompts": ({"prompts": None}, r"config.ppo.judging.prompts=None must be named"),
    "no such prompts": ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl"),
    "a judge of another world": (
        {"judge": JudgeConfig(offline="clinic")},
        "the clinic's judge needs one of the clinic's diseases",
    ),
    "never": ({"every": 0}, "every=0 must be at least 1"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_JUDGINGS.values(), ids=WRONG_JUDGINGS.keys())
def test_a_wrong_judging_ends_in_one_clear_message(files, held_out, tmp_path, change, message):
    settings = {"every": 1, "prompts": held_out, "judge": JudgeConfig()} | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_ppo(_config(files, judging=JudgingConfig(**settings)), tmp_path)
    assert not (tmp_path / "ppo").exists()


class ByLength(dict):
    """Utilities of texts that nobody knows beforehand: the longer one is the better one."""

    def __missing__(self, text):
        return len(text)


@pytest.mark.slow
def test_a_judge_behind_a_server_is_paid_once_for_each_question_whatever_ends_the_run(
    files, held_out, tmp_path, monkeypatch
):
    """The budget ends in the middle of a judging; with more of it the run goes on there."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def config(max_requests):
        judging = JudgingConfig(
            every=1,
            prompts=held_out,
            judge=JudgeConfig(base_url=server.url, model=MODEL, max_requests=max_requests),
            concurrency=1,
            spending=str(tmp_path / "shared.spending.jsonl"),
        )
        return _config(files, judging=judging)

    with PlantedServer(Planted(utilities=ByLength(), noise=False)) as server:
        with pytest.raises(ValueError, match="max_requests=13"):
            run_ppo(config(13), tmp_path)
        assert len(server.calls) == 13
        steps = [row["step"] for row in read_rows(tmp_path / "ppo" / "metrics.jsonl")]
        assert steps == [0, 1, 1, 2]  # The second judging was under way.
        result = run_ppo(config(99), tmp_path)
        asked = [call.texts for call in server.calls]
    assert len(asked) == len(set(asked)) == 20  # Five prompts, two orders, two judgings.
    spent = (tmp_path / "shared.spending.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum("outcome" in json.loads(line) for line in spent) == 20
    rows = read_rows(tmp_path / "ppo" / "metrics.jsonl")
    judged = {row["step"]: row for row in rows if _is_judged(row)}
    for step in (1, 2):
        path = tmp_path / "ppo" / "judged" / str(step) / "answers.jsonl"
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        points = []
        for record in records:
            initial, new = (len(one["text"].strip()) for one in record["answers"])
            points.append(0.5 if initial == new else float(new > initial))
        assert judged[step]["judged/share"] == pytest.approx(np.mean(points))
    assert result["ended"] == "all iterations"


def test_a_value_head_that_is_zero_starts_at_0_and_a_kept_one_does_not(files, trained):
    rows = read_rows(trained[0] / "ppo" / "metrics.jsonl")
    assert rows[0]["ppo/value"] == 0.0 != rows[1]["ppo/value"]


WRONG = {
    "no such policy": ("model.directory", "nowhere", "nowhere"),
    "a policy that scores": ("model.directory", "reward", "a policy needs a token head"),
    "no such reward model": ("reward_model", "nowhere", "nowhere"),
    "a reward model that answers": ("reward_model", "sft", "has no score head"),
    "no normalization": ("reward_model", "unnormalized", "holds no normalization"),
    "no such prompts": ("data.paths", ("nowhere.jsonl",), "nowhere.jsonl"),
    "no prompt that fits": (
        "data.max_prompt_tokens",
        2,
        "none of the 6 .*max_prompt_tokens=2",
    ),
    "too few positions": ("rollout.max_new_tokens", 100, "at most the model's 128 positions"),
    "an unknown template": ("data.template", "alpaca", "template: 'alpaca' is not known"),
    "minibatches": ("num_minibatches", 3, "num_minibatches=3 must divide the 4 answers"),
    "one answer": ("estimator", "rloo", "needs rollout.answers_per_prompt >= 2"),
    "k2": ("kl_in", "k2", "kl_in='k2' must be one of"),
    "penalty": ("score.penalty", None, "penalty=None must be 0 or more"),
    "the scale of another score": ("score.of", "length", "scale='stored' is the reward model's"),
    "unknown field": ("learning_rate", 1.0, "PpoConfig has no field 'learning_rate'"),
}


@pytest.mark.parametrize(("path", "value", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_setting_ends_in_one_clear_message(files, tmp_path, path, value, message):
    if isinstance(value, str) and (files / value).is_dir():
        value = str(files / value)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_ppo(replaced(_config(files), {path: value}), tmp_path)
    assert not (tmp_path / "ppo" / "metrics.jsonl").exists()


def test_a_reward_model_of_another_tokenizer_is_refused(files, tmp_path):
    other = tmp_path / "other"
    _save(other, "score", 4)
    save_normalization(other, NORMALIZATION)
    path = other / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(ValueError, match="differ in 4 tokens"):
        run_ppo(_config(files, reward_model=str(other)), tmp_path / "run")


@pytest.mark.slow
def test_an_answer_that_ends_with_any_stop_id_of_the_model_is_finished_and_not_penalised(
    files, tmp_path
):
    """The policy's generation config lists every token that a greedy answer can begin with."""
    policy = tmp_path / "policy"
    shutil.copytree(files / "sft", policy)
    run_bulk(
        BulkConfig(
            model=str(policy),
            prompts=str(files / "prompts.jsonl"),
            output=str(tmp_path / "answers.jsonl"),
            sampling=SamplingConfig(max_new_tokens=1, temperature=0.0),
        )
    )
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    first = {json.loads(line)["answers"][0]["token_ids"][0] for line in lines if line}
    content = {"eos_token_id": sorted(first)}
    (policy / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
    config = _config(
        files,
        model=ModelConfig(directory=str(policy)),
        rollout=RolloutConfig(num_prompts=4, max_new_tokens=6, temperature=1e-3),
        num_iterations=1,
    )
    result = run_ppo(config, tmp_path)
    assert (result["ppo/eos_rate"], result["ppo/response_length"]) == (1.0, 1.0)
    folder = tmp_path / "ppo"
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().split("\n")[:-1]]
    for one in samples:
        assert (one["finish_reason"], one["length"]) == ("stop", 1)
        assert one["answer_score"] == pytest.approx(NORMALIZATION.apply(one["score"]), abs=1e-4)
    # What the policy was trained to stop at goes on with it.
    written = json.loads((folder / "model" / "generation_config.json").read_text())
    assert set(written["eos_token_id"]) == {load_tokenizer(TOKENIZER).eos_token_id, *first}


def test_dialogues_give_their_first_words_or_all_before_the_last_answer():
    tokenizer = load_tokenizer(TOKENIZER)
    path = str(SAMPLE_FOLDER / "real_conversation.jsonl")
    first, last = (
        open_prompts(
            PromptsConfig(paths=(path,), reads=reads),
            tokenizer,
            max_new_tokens=4,
            stop_token_ids=(tokenizer.eos_token_id,),
        )
        for reads in ("first_turns", "last_turns")
    )
    assert len(first.items) == len(last.items) > 50
    shorter = [
        len(one.token_ids) < len(other.token_ids)
        for one, other in zip(first.items, last.items, strict=True)
    ]
    assert sum(shorter) > len(shorter) / 2
    assert [one.id for one in first.items] == [one.id for one in last.items]


def test_each_pass_over_the_prompts_has_every_prompt_once_in_an_order_of_its_own(files):
    tokenizer = load_tokenizer(TOKENIZER)
    cfg = PromptsConfig(paths=(str(files / "prompts.jsonl"),))
    stops = (tokenizer.eos_token_id,)
    prompts = open_prompts(cfg, tokenizer, max_new_tokens=4, stop_token_ids=stops)
    ids = [one.id for one in prompts.rows(0, 18, seed=3)]
    passes = [ids[:6], ids[6:12], ids[12:]]
    assert all(sorted(one) == [f"p{index}" for index in range(6)] for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert [one.id for one in prompts.rows(4, 5, seed=3)] == ids[4:9]


def test_the_default_config_names_its_stages_and_takes_models():
    sys.path.insert(0, str(ROOT / "configs"))
    try:
        import ppo
    finally:
        sys.path.pop(0)
    assert ppo.get_config().stages == ("sft", "reward", "ppo")
    config = ppo.get_config("one/model,two/model,mine.jsonl")
    assert config.stages == ("ppo",) and config.ppo.data.paths == ("mine.jsonl",)
    assert (config.ppo.model.directory, config.ppo.reward_model) == ("one/model", "two/model")
    config = ppo.get_config("rloo")
    assert config.stages == ("sft", "reward", "ppo") and config.ppo.estimator == "rloo"
    config = ppo.get_config("grpo,one/model,two/model")
    assert config.stages == ("ppo",) and config.ppo.estimator == "grpo"
    assert config.ppo.rollout.answers_per_prompt == 4


@pytest.mark.slow
def test_the_command_runs_the_default_config(tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu", XLA_FLAGS="")
    short = ("--config.sft.num_steps=4", "--config.reward.num_steps=4")
    found = subprocess.run(
        [sys.executable, "launch/train.py", "--config=configs/ppo.py", f"--workdir={tmp_path}"]
        + [*short, "--config.ppo.num_iterations=2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "ppo: finished in" in found.stdout
