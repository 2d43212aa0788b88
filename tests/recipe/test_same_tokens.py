"""One sampled answer, one set of tokens and one score: in PPO, labels, reward training, scoring.

The policy is made to say a few words of its vocabulary at random, the space and the ends of a turn
among them, so that answers end as the template ends them or not, are cut off, are empty, and are
mostly not what their own text tokenises to.
"""

import json

import jax
import numpy as np
import pytest

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint.models import save_orbax
from huatuo_jax.core import files
from huatuo_jax.data.answers import text_of
from huatuo_jax.data.chat import templates
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.records import Message
from huatuo_jax.evaluation.answers import EvaluationConfig, score_answers_file
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.ppo.config import PpoConfig, PpoLoopConfig, RolloutConfig, ScoreConfig, ValueConfig
from huatuo_jax.ppo.prompts import PromptsConfig
from huatuo_jax.ppo.rewards import AnswerScoreConfig
from huatuo_jax.ppo.stage import run_ppo
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource, open_comparisons
from huatuo_jax.preferences.label import LabelRun, run_labels
from huatuo_jax.reward.score_file import ScoreConfig as FileConfig
from huatuo_jax.reward.score_file import read_answers, score_file
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.scoring import Normalization, save_normalization
from tests.data.test_templates import LLAMA2_JINJA
from tests.tiny import TOKENIZER, backbone

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BACKBONE = backbone(
    vocab_size=2048 + len(SPECIALS),
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
)
NORMALIZATION = Normalization(mean=0.2, standard_deviation=2.0, num_answers=9, answers="nine")
RULE = AnswerScoreConfig(clip=0.1, on_truncation="subtract", penalty=0.7)
NUM_PROMPTS, NUM_SAMPLES, MOST_TOKENS = 3, 12, 4

pytestmark = pytest.mark.usefixtures("on_one_device")


def _save_models(folder, template, tokenizer):
    """A policy that says a few words, and a reward model whose scores differ."""
    params = init_params(jax.random.key(0), BACKBONE, ComputeConfig(), head="lm")
    words = [tokenizer.encode(text, add_special_tokens=False) for text in ("好的，医生。 ", "发烧")]
    said = {token for ids in words for token in ids} | set(template.stop_token_ids(tokenizer))
    table = np.array(params["embedding"]["table"]) * 0.1
    table[:, 0] = 4.0  # The same for all: what the head can tell the words by.
    head = np.zeros_like(params["lm_head"]["kernel"])
    head[0, sorted(said)] = 3.0
    params |= {"embedding": {"table": table}, "lm_head": {"kernel": head}}
    save_orbax(params, BACKBONE, folder / "sft", head="lm", source_folder=folder / "tokenizer")
    scores = init_params(jax.random.key(1), BACKBONE, ComputeConfig(), head="score")
    scores = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, scores)
    save_orbax(
        scores, BACKBONE, folder / "reward", head="score", source_folder=folder / "tokenizer"
    )
    save_normalization(folder / "reward", NORMALIZATION)


def _sample(folder, template, tokenizer):
    """PPO's own answers with its scores: the rows of its samples."""
    prompts = [
        {
            "id": f"p{index}",
            "messages": [
                {"role": "user", "content": f"第{index}天还咳嗽。" * (1 + 3 * index)},
                {"role": "assistant", "content": "发烧吗？"},
                {"role": "user", "content": "没有。"},
            ],
            "source": "test",
            "reference": "好的。",
        }
        for index in range(NUM_PROMPTS)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in prompts)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    lengths = [
        len(template.prompt([Message(**one) for one in prompt["messages"]], tokenizer))
        for prompt in prompts
    ]
    cfg = PpoConfig(
        model=ModelConfig(directory=str(folder / "sft")),
        reward_model=str(folder / "reward"),
        data=PromptsConfig(
            paths=(str(folder / "prompts.jsonl"),),
            template=template.name,
            max_prompt_tokens=max(lengths) - 1,  # The longest one loses its first exchange.
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        value=ValueConfig(start="policy"),
        rollout=RolloutConfig(
            num_prompts=NUM_PROMPTS, answers_per_prompt=NUM_SAMPLES, max_new_tokens=MOST_TOKENS
        ),
        score=ScoreConfig(clip=RULE.clip, on_truncation=RULE.on_truncation, penalty=RULE.penalty),
        num_iterations=1,
        num_epochs=1,
        num_minibatches=1,
        loop=PpoLoopConfig(samples_per_iteration=NUM_PROMPTS * NUM_SAMPLES, tensorboard=False),
    )
    run_ppo(cfg, folder / "run")
    samples = files.read_rows(folder / "run" / "ppo" / "samples.jsonl", unfinished="read")
    return prompts, samples


def _tokenizer(folder):
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = LLAMA2_JINJA
    tokenizer.save_pretrained(folder / "tokenizer")
    return load_tokenizer(folder / "tokenizer")


@pytest.mark.parametrize(
    "name",
    [
        "huatuogpt",
        pytest.param("chatml", marks=pytest.mark.slow),
        pytest.param("llama2", marks=pytest.mark.slow),
        pytest.param("llama3", marks=pytest.mark.slow),
        pytest.param("baichuan", marks=pytest.mark.slow),
        pytest.param("tokenizer", marks=pytest.mark.slow),
    ],
)
def test_a_sampled_answer_has_the_same_tokens_and_score_in_every_stage(name, tmp_path):
    template, tokenizer = templates.by_name(name), _tokenizer(tmp_path)
    _save_models(tmp_path, template, tokenizer)
    prompts, samples = _sample(tmp_path, template, tokenizer)
    assert {one["finish_reason"] for one in samples} == {"stop", "length"}
    records = []
    for prompt in prompts:
        mine = [one for one in samples if one["id"] == prompt["id"]]
        assert len(mine) == NUM_SAMPLES
        ids = mine[0]["prompt_token_ids"]
        whole = template.prompt([Message(**one) for one in prompt["messages"]], tokenizer)
        dropped = {} if ids == whole else {"messages_dropped": 2}
        answers = []
        for one in mine:
            ended = one["finish_reason"] == "stop"
            text = text_of(tokenizer, one["token_ids"][: -1 if ended else None])
            answers.append(
                {
                    "text": template.content_of(text, tokenizer, ended=ended),
                    "token_ids": one["token_ids"],
                    "finish_reason": one["finish_reason"],
                }
            )
        records.append({**prompt, **dropped, "prompt_token_ids": ids, "answers": answers})
    assert any("messages_dropped" in one for one in records)
    path = tmp_path / "answers.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records)
    path.write_text(text, encoding="utf-8")

    # score.py and evaluation against PPO.
    assert np.std([one["score"] for one in samples]) > 1e-3
    by_prompt = {
        prompt["id"]: [one for one in samples if one["id"] == prompt["id"]] for prompt in prompts
    }
    done = score_file(
        FileConfig(
            model=str(tmp_path / "reward"),
            input=str(path),
            output=str(tmp_path / "scores.jsonl"),
            template=name,
            rule=RULE,
        )
    )
    assert done.num_as_sampled == len(samples) and done.num_retokenized == 0
    assert done.num_cut_off == sum(one["finish_reason"] == "length" for one in samples)
    for row in files.read_rows(tmp_path / "scores.jsonl", unfinished="read"):
        mine = by_prompt[row["id"]]
        np.testing.assert_allclose(row["scores"], [one["score"] for one in mine], atol=1e-6)
        np.testing.assert_allclose(row["rewards"], [one["answer_score"] for one in mine], atol=1e-6)
    evaluation = EvaluationConfig(
        reward=str(tmp_path / "reward"), template=name, score=RULE, max_new_tokens=MOST_TOKENS
    )
    rewards = score_answers_file("ppo", str(path), evaluation, tmp_path).rewards
    for prompt_id, found in rewards.items():
        expected = [one["answer_score"] for one in by_prompt[prompt_id]]
        np.testing.assert_allclose(found, expected, atol=1e-6)

    # Labels, comparisons and the reward model's training tokens.
    run_labels(
        LabelRun(
            answers=str(path),
            output=str(tmp_path / "labels.jsonl"),
            openai=None,
            comparisons=str(tmp_path / "comparisons.jsonl"),
        ),
        lambda line: None,
    )
    data = ComparisonsConfig(
        sources=(ComparisonSource(paths=(str(tmp_path / "comparisons.jsonl"),)),),
        template=name,
        max_length=240,
        row_length=480,
        held_out=HeldOutConfig(share=0.0),
    )
    sampled = {(*one["prompt_token_ids"], *one["token_ids"]) for one in samples}
    trained = {
        tuple(answer.token_ids.tolist())
        for group in open_comparisons(data, tokenizer).train
        for answer in group.answers
    }
    assert trained and trained <= sampled
    normalized = {tuple(one.token_ids.tolist()) for one in read_answers(str(path), data, tokenizer)}
    assert normalized == sampled
    for group in open_comparisons(data, tokenizer).train:
        for answer in group.answers:
            start = int(np.argmax(answer.is_answer))
            assert answer.is_answer[start:].all() and answer.as_sampled
    # The test would see an answer that is tokenised again.
    rendered = {
        tuple(answer.token_ids.tolist())
        for answer in read_answers(str(_without_ids(path)), data, tokenizer)
    }
    assert rendered != sampled


def _without_ids(path):
    rows = files.read_rows(path, unfinished="read")
    for row in rows:
        for answer in row["answers"]:
            del answer["token_ids"]
    texts = path.with_name("texts.jsonl")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    texts.write_text(text, encoding="utf-8")
    return texts
