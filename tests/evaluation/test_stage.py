"""What an evaluation makes of answers and scores, against plain loops; its losses and KL."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.checkpoint.models import find_model, save_orbax
from huatuo_jax.clinic.dialogues import prompts
from huatuo_jax.clinic.diseases import DISEASES
from huatuo_jax.core.sharding import make_mesh
from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.evaluation.answers import ScoredAnswers
from huatuo_jax.evaluation.release import COMPARED, LEAST_PROMPTS, release
from huatuo_jax.evaluation.stage import compare, sequence_kl
from huatuo_jax.judge.offline import OfflineJudge, TruthJudge
from huatuo_jax.judge.questions import Answered
from huatuo_jax.training.scoring import GivenAnswer
from tests.tiny import backbone

BACKBONE = backbone(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_kv_heads=1,
    head_dim=8,
    max_positions=64,
)


def scored(seed, shift, reasons=("stop", "length")):
    draw = np.random.default_rng(seed)
    answers, rewards, records = [], {}, []
    for index in range(6):
        prompt = Prompt(
            id=f"p{index}",
            messages=(Message("user", f"咳嗽{index}天"),),
            source="test",
            reference="多喝水，注意休息。",
        )
        texts = ["多喝水。" * int(draw.integers(1, 9)) for _ in reasons]
        answers.append(Answered(prompt, tuple(texts)))
        rewards[prompt.id] = [float(shift + draw.normal()) for _ in reasons]
        records.append(
            {
                "id": prompt.id,
                "prompt_token_ids": [1, 2],
                "answers": [
                    {"text": text, "token_ids": [3], "finish_reason": reason}
                    for text, reason in zip(texts, reasons, strict=True)
                ],
            }
        )
    return ScoredAnswers(answers, rewards, records)


def four(base, sft, ppo):
    """With one answer of best-of-n to each prompt, which came to its end."""
    best = scored(3, 1.5, reasons=("stop",))
    return {"base": base, "sft": sft, "ppo": ppo, "best_of_n": best}


def test_best_of_n_stands_with_its_one_answer_against_each_of_the_others():
    answers = four(scored(0, -1.0), scored(1, 0.0), scored(2, 2.0))
    found = compare(answers, judge=OfflineJudge(), seed=0)
    for other in ("sft", "base", "ppo"):
        won = found["win_rates"][f"best_of_n_over_{other}"]
        assert won["wins"] + won["ties"] + won["losses"] == 6 * 2
        assert won["share"]["num_prompts"] == 6
    assert found["models"]["best_of_n"]["stopped"]["value"] == 1.0


def test_figures_are_means_over_prompts_and_differences_of_them():
    answers = four(scored(0, -1.0), scored(1, 0.0), scored(2, 2.0))
    found = compare(answers, judge=OfflineJudge(), seed=0)
    means = {
        name: np.mean([np.mean(values) for values in one.rewards.values()])
        for name, one in answers.items()
    }
    for name in means:
        assert found["models"][name]["reward"]["value"] == pytest.approx(means[name])
        assert found["models"][name]["stopped"]["value"] == (1.0 if name == "best_of_n" else 0.5)
    for one, other in COMPARED:
        gain = found["differences"][f"{one}_over_{other}"]["reward"]
        assert gain["value"] == pytest.approx(means[one] - means[other])
        assert gain["low"] < gain["value"] < gain["high"]
    lengths = [len(text) for item in answers["ppo"].answered for text in item.answers]
    assert found["models"]["ppo"]["characters"]["value"] == pytest.approx(np.mean(lengths))


def test_the_clinics_truth_stands_beside_a_pick_that_its_judge_prefers():
    """PPO says what the doctor says, SFT names another disease, base says little."""
    asked = list(prompts(LEAST_PROMPTS, seed=0))

    def saying(text_of):
        answered, records = [], []
        for prompt in asked:
            text = text_of(prompt)
            answered.append(Answered(prompt, (text,)))
            answer = {"text": text, "token_ids": [1], "finish_reason": "stop"}
            records.append({"id": prompt.id, "prompt_token_ids": [1], "answers": [answer]})
        return ScoredAnswers(answered, {prompt.id: [0.0] for prompt in asked}, records)

    def wrong(prompt):
        return f"考虑{next(name for name in DISEASES if name != prompt.diagnosis)}。"

    sft = saying(wrong)
    answers = {
        "base": saying(lambda prompt: "好。"),
        "sft": sft,
        "ppo": saying(lambda prompt: prompt.reference),
        "best_of_n": sft,
    }
    found = release(compare(answers, judge=TruthJudge(), seed=0), best_of_n=2)
    assert found["pick"] == "ppo" and found["warnings"] == []
    assert "clinic-truth-v1 prefers it to SFT (share " in found["reason"]
    right = found["truth"]["diagnosis_right"]
    assert right["sft"]["value"] == 0.0 and right["pick"]["value"] > 0.5
    assert right["difference"]["low"] > 0


def test_gain_by_length_and_gain_at_equal_length_add_up_to_the_gain():
    answers = four(scored(0, 0.0), scored(1, 0.0), scored(2, 1.0))
    found = compare(answers, judge=OfflineJudge(), seed=0)
    parts = found["length"]
    assert parts["gain_by_length"]["value"] + parts["gain_at_equal_length"]["value"] == (
        pytest.approx(found["differences"]["ppo_over_sft"]["reward"]["value"])
    )


def test_a_reward_that_is_length_alone_leaves_nothing_at_equal_length():
    answers = four(scored(0, 0.0), scored(1, 0.0), scored(2, 0.0))
    by_length = {
        name: one._replace(
            rewards={
                item.prompt.id: [0.1 * len(text) for text in item.answers] for item in one.answered
            }
        )
        for name, one in answers.items()
    }
    parts = compare(by_length, judge=OfflineJudge(), seed=0)["length"]
    assert parts["reward_per_character"] == pytest.approx(0.1)
    assert parts["gain_at_equal_length"]["value"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
def test_the_kl_is_the_sum_of_both_models_log_ratios_over_the_answers_tokens(tmp_path):
    models = {}
    for seed, name in enumerate(("policy", "reference")):
        params = init_params(jax.random.key(seed), BACKBONE, ComputeConfig(), head="lm")
        save_orbax(params, BACKBONE, tmp_path / name, head="lm")
        models[name] = params
    draw = np.random.default_rng(0)
    answers = {
        "a": [GivenAnswer(draw.integers(0, 64, size=9).astype(np.int32), 4)],
        "b": [GivenAnswer(draw.integers(0, 64, size=n).astype(np.int32), 2) for n in (3, 12)],
    }
    found, num_tokens = sequence_kl(
        find_model(tmp_path / "policy"),
        find_model(tmp_path / "reference"),
        answers,
        compute=ComputeConfig(),
        mesh=make_mesh(data=1, fsdp=-1, tensor=1),
        rows_at_once=8,
        temperature=0.7,
    )
    assert num_tokens == 5 + 1 + 10
    module = Transformer(BACKBONE, ComputeConfig())
    for name, one in itertools.chain(*([(k, x) for x in v] for k, v in answers.items())):
        ids_BT = jnp.asarray(one.token_ids)[None, :]
        total = 0.0
        for sign, params in ((1, models["policy"]), (-1, models["reference"])):
            hidden = module.apply({"params": params}, ids_BT)
            logits = module.apply({"params": params}, hidden, method="logits")[0, :, :64] / 0.7
            log_probs = jax.nn.log_softmax(logits)
            for place in range(one.prompt_length, len(one.token_ids)):
                total += sign * float(log_probs[place - 1, int(one.token_ids[place])])
        assert any(value == pytest.approx(total, abs=1e-4) for value in found[name])
