"""Model cards: read back as the Hub does, with the run's figures and nobody's Markdown."""

import dataclasses
import json
import re

import huggingface_hub
import jax
import pytest
import transformers
from huggingface_hub import ModelCard

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint import models
from huatuo_jax.data.chat.templates import by_name
from huatuo_jax.data.records import Message
from huatuo_jax.evaluation.release import CANDIDATES, COMPARED
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.hf.generation_config import set_stop_token_ids
from huatuo_jax.hf.tokenizer import load_tokenizer, set_chat_template
from huatuo_jax.recipe.export import Policy, export_policy
from huatuo_jax.recipe.model_cards import ADVICE, License, Origin, policy_card, reward_card
from huatuo_jax.report.run import MODELS, read_run
from huatuo_jax.reward.export import export_reward_model
from huatuo_jax.training.scoring import Normalization, save_normalization
from tests.recipe.tiny import BACKBONE
from tests.tiny import TOKENIZER

ORIGIN = Origin(
    base_model="someone/base",
    base="[someone/base](https://huggingface.co/someone/base)",
    license=License("other", "qwen", "https://huggingface.co/someone/base", "the card"),
    languages=("zh", "en"),
    datasets=("someone/dialogues",),
    is_clinic=False,
)
SETTINGS = {"title": "A run", "num_weights": 600_000}
HOSTILE = (
    "```\n---\nlicense: mit\n---\n# 假标题\n</details><script>alert(1)</script>\n"
    "{{ 7 * 7 }} {% raw %}\n"
    "````` | **a** \x00\ud800\u202e\r\n| --- |\r结束"
)


def figure(value, **counts):
    return {
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        **(counts or {"num_prompts": 9}),
    }


def write(folder, name, found):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture
def workdir(tmp_path):
    """The files of a finished run that cards tell of."""
    model = {"reward": figure(0.25), "judge_overall": figure(3.5), "characters": figure(80.0)}
    model |= {"stopped": figure(0.9), "truth_diagnosis_right": figure(0.625)}
    evaluation = {
        "num_prompts": 9,
        "judge": "a|judge\n# x",
        "models": {name: model for name in MODELS},
        "win_rates": {
            f"{one}_over_{other}": {
                "share": figure(0.625),
                "wins": 5,
                "ties": 1,
                "losses": 3,
                "failed": 0,
            }
            for one, other in COMPARED
        },
        "held_out_loss": {"sft": {"eval/loss": 1.25}},
        "kl": {"per_sequence": figure(1.75)},
        "sampling": {"num_samples": 2, "temperature": 0.5, "max_new_tokens": 100},
        "release": {"warnings": ["It asks back less often."]},
    }
    write(tmp_path, "evaluation.json", evaluation)
    messages = [
        {"role": "system", "content": "secret system text"},
        {"role": "user", "content": HOSTILE},
        {"role": "assistant", "content": "几天了？"},
        {"role": "user", "content": "很久" * 400},
    ]
    records = [
        {"id": str(index), "messages": messages, "answers": [{"text": f"{HOSTILE}{index}"}]}
        for index in range(4)
    ]
    for name in MODELS:
        text = "".join(f"{json.dumps(one)}\n" for one in records)
        (tmp_path / "evaluation").mkdir(exist_ok=True)
        (tmp_path / "evaluation" / f"scored_{name}.jsonl").write_text(text, encoding="utf-8")
    pairs = {"num_pairs": 40, "num_cases": 12}
    report = {
        "num_pairs": 40,
        "num_cases": 12,
        "accuracy": figure(0.75, **pairs),
        "loss": 0.5,
        "length_baseline": {"accuracy": figure(0.5, **pairs), "loss": 0.69},
        "accuracy_above_length_baseline": figure(0.25, **pairs),
        "probes": [
            {
                "name": "a|probe",
                "chosen": "longer",
                "neutral": True,
                "accuracy": figure(0.875, **pairs),
                "length_accuracy": figure(1.0, **pairs),
            }
        ],
        "comparisons": {"train_pairs": 400},
    }
    write(tmp_path, "reward/reward_report.json", report)
    part = {"judge": "some-model", "protocol": "score", "judgements": 1200}
    write(tmp_path, "labels.jsonl.report.json", {"judges": [part]})
    account = {"used": {"to train on": 300, "held out": 9}, "set_aside": {"for PPO": 4}}
    write(tmp_path, "prompts.jsonl.report.json", account)
    journal = {
        "sft": {
            "settings": {"optimizer": {"learning_rate": 3e-5, "weight_decay": 0.0}},
            "result": {"step": 9},
        },
        "ppo": {
            "settings": {"kl_coef": 0.03, "model": {"lora": {"rank": 8}}},
            "result": {"kept_iteration": 15},
        },
        "labels": {"settings": {"model": "m"}, "result": None},
    }
    write(tmp_path, "recipe.json", journal)
    return tmp_path


def release_of(name):
    release = {"policy": name, "sentence": f"{name} is released: share 0.625."}
    if name == "best_of_n":
        release["best_of_n"] = {
            "n": 4,
            "temperature": 0.5,
            "max_new_tokens": 100,
            "score": {"clip": 5.0},
        }
    return release


def policy(workdir, name="ppo", *, origin=ORIGIN, num_samples=3):
    run = read_run(workdir)
    return policy_card(
        run,
        release_of(name),
        origin,
        num_samples=num_samples,
        same_tokens=True,
        **SETTINGS,
    )


def reward(workdir, *, is_of_run=True, origin=ORIGIN):
    normalization = Normalization(
        mean=-0.5, standard_deviation=2.0, num_answers=9, answers="answers.jsonl"
    )
    return reward_card(read_run(workdir), origin, normalization, is_of_run=is_of_run, **SETTINGS)


def outside_of_code(card):
    """The lines of a card's body that are no block of code, by CommonMark's rule."""
    lines, fence = [], None
    for line in ModelCard(card).text.split("\n"):
        opened = re.match("`{3,}", line)
        if fence is None and opened:
            fence = opened[0]
        elif fence is not None and re.fullmatch(f"`{{{len(fence)},}}", line.strip()):
            fence = None
        elif fence is None:
            lines.append(line)
    assert fence is None
    return lines


def test_the_metadata_is_what_the_hub_reads(workdir):
    data = ModelCard(policy(workdir)).data
    assert (data.base_model, data.language, data.datasets) == (
        "someone/base",
        ["zh", "en"],
        ["someone/dialogues"],
    )
    assert (data.license, data.license_name) == ("other", "qwen")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    found = {(one.metric_type, one.metric_name): one for one in data.eval_results}
    share = found["win_rate", "share of points over SFT, judged by a|judge\n# x"]
    assert (share.metric_value, share.task_type) == (0.625, "text-generation")
    assert share.metric_args == {"low": 0.525, "high": 0.725, "confidence": 0.95, "num_prompts": 9}
    assert found["truth_diagnosis_right", "names the right disease"].metric_value == 0.625
    data = ModelCard(reward(workdir)).data
    assert data.pipeline_tag == "text-classification"
    assert [(one.metric_type, one.metric_value) for one in data.eval_results] == [
        ("accuracy", 0.75),
        ("preference", 0.875),
    ]


def test_what_is_not_known_is_left_out_of_the_metadata(workdir):
    unknown = dataclasses.replace(
        ORIGIN, base_model=None, base="none", license=License(), languages=(), datasets=()
    )
    for card in (policy(workdir, origin=unknown), reward(workdir, origin=unknown)):
        found = ModelCard(card).data.to_dict()
        assert not {"base_model", "license", "language", "datasets"} & found.keys()
        assert "| licence | unknown: " in card and "| languages | not known |" in card


def test_a_card_tells_the_run(workdir):
    card = policy(workdir)
    for told in (
        "ppo is released: share 0.625.",
        ADVICE,
        "| prompts | 300 | 9 |",
        "| judgements of answers by some-model (score) | 1,200 | – |",
        "| comparisons | 400 | 40 |",
        "| fine-tuning | learning rate 3e-05; weight decay 0 |",
        "KL coefficient at first 0.03; adapters' rank (LoRA) 8; kept the policy of iteration 15 |",
        "| PPO over SFT | 0.625 (0.525 to 0.725) | 5 | 1 | 3 | 0 |",
        "1.750 (1.650 to 1.850) nats an answer",
        "**It asks back less often.**",
        "vllm serve MODEL",
        "--model-path MODEL",
        "The model is small (600,000 weights)",
        r"- The judge: a\|judge # x is a language model.",
    ):
        assert told in card, told
    card = reward(workdir)
    for told in (
        "| reward model | 0.750 (0.650 to 0.850) | 0.500 |",
        r"| a\|probe | the longer one (neither is right) | 0.875 (0.775 to 0.975) |",
        '"use_activation": false',
        "| mean | -0.5 |",
        "- Whom it imitates: some-model is a language model.",
        ADVICE,
    ):
        assert told in card, told


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_has_its_card(workdir, name):
    card = policy(workdir, name)
    is_best = name == "best_of_n"
    assert ("alone they are not what was released" in " ".join(card.split())) == is_best
    assert ("4 times the inference" in card) == is_best
    names = {one.metric_name for one in ModelCard(card).data.eval_results}
    assert ("share of points over base, judged by a|judge\n# x" in names) == (name != "base")


def test_models_of_elsewhere_have_none_of_the_runs_figures(workdir):
    card = policy(workdir, "folder")
    assert ModelCard(card).data.eval_results is None
    assert "0.625 (" not in card and "很久" not in card and "| comparisons |" not in card
    card = reward(workdir, is_of_run=False)
    assert ModelCard(card).data.eval_results is None and "0.750" not in card


def test_words_of_the_data_cannot_break_the_card(workdir):
    card = policy(workdir)
    card.encode("utf-8")
    assert card.count("{{ 7 * 7 }}") == 2 * 3  # As it stands: nothing renders it.
    assert ModelCard(card).data.license == "other"
    lines = outside_of_code(card)
    assert not any("假标题" in line or "script" in line or "结束" in line for line in lines)
    assert "secret system text" not in card
    assert "很久" * 300 + " ... (cut)" in card and "很久" * 301 not in card
    headings = [line for line in lines if line.startswith("#")]
    assert headings == [
        "# A run: the model after PPO",
        "## How to use it",
        "## What it learned from",
        "## How it was trained",
        "## What it is worth",
        "## Sample answers",
        "## Limits",
    ]
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.endswith(" |") for line in tables)
    assert "Sample answers" not in policy(workdir, num_samples=0)


def test_a_card_names_no_place_of_the_machine(workdir):
    for card in (policy(workdir), reward(workdir)):
        assert str(workdir) not in card and "/home/" not in card


def code_of(card, language):
    return re.findall(rf"^```{language}\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


@pytest.fixture
def exported(tmp_path_factory):
    """A policy and a reward model as a run exports them."""
    tmp_path = tmp_path_factory.mktemp("exported")
    tokenizer, template = load_tokenizer(TOKENIZER), by_name("huatuogpt")
    for name, head in (("policy", "lm"), ("reward", "score")):
        params = init_params(jax.random.key(0), BACKBONE, ComputeConfig(), head=head)
        source = tmp_path / "source" / name
        files = tmp_path / "files"
        tokenizer.save_pretrained(files)
        set_chat_template(files, template.to_jinja(tokenizer))
        stops = template.stop_token_ids(tokenizer)
        set_stop_token_ids(files, stops, tokenizer, vocab_size=BACKBONE.vocab_size)
        models.save_orbax(params, BACKBONE, source, head=head, source_folder=files)
    sampling = SamplingConfig(max_new_tokens=3, temperature=0.5)
    chosen = Policy("sft", str(tmp_path / "source" / "policy"), {}, template, sampling)
    export_policy(chosen, tmp_path / "policy")
    found = Normalization(mean=0.0, standard_deviation=1.0, num_answers=2, answers="a.jsonl")
    save_normalization(tmp_path / "source" / "reward", found)
    export_reward_model(tmp_path / "source" / "reward", tmp_path / "reward")
    return tmp_path


def test_the_lines_of_a_policys_card_run(workdir, exported, capsys):
    (lines,) = code_of(policy(workdir), "python")
    exec(lines.replace("MODEL", str(exported / "policy")), {})
    assert capsys.readouterr().out.count("\n") >= 1


def test_the_lines_of_a_reward_models_card_score_as_it_was_trained(workdir, exported):
    (lines,) = code_of((exported / "reward" / "README.md").read_text(encoding="utf-8"), "python")
    assert lines == code_of(reward(workdir), "python")[0]
    values = {}
    exec(lines.replace("MODEL", str(exported / "reward")), values)
    dialogue = [Message(**one) for one in values["messages"]]
    trained = by_name("huatuogpt").render(dialogue, load_tokenizer(TOKENIZER)).token_ids
    assert values["token_ids"] == trained
    assert isinstance(values["score"], float)


def test_the_card_of_a_converted_reward_model_is_read_back(exported):
    card = ModelCard((exported / "reward" / "README.md").read_text(encoding="utf-8"))
    assert card.data.pipeline_tag == "text-classification"
    assert huggingface_hub.metadata_load(exported / "reward" / "README.md")["tags"] == [
        "reward-model",
        "medical",
    ]
    config = transformers.AutoConfig.from_pretrained(exported / "reward")
    assert config.num_labels == 1


def write_suites(folder):
    """Results of suites: one that is judged, an exam of two sets, and the clinic."""

    def exam(value):
        return {"generation": {"accuracy": {"value": value, "low": 0.25, "high": 0.5, "num": 20}}}

    names = ("sft", "ppo")
    suites = {
        "exams": {
            "settings": {"by": ["generation"]},
            "sets": {
                "cmmlu": {"num": 20, "models": {"sft": exam(0.3125), "ppo": exam(0.4375)}},
                "my|set": {"num": 20, "models": {"sft": exam(0.28125), "ppo": exam(0.34375)}},
            },
        },
        "single_turn": {
            "comparisons": [{"models": list(names), "figures": {"overall": {"share": figure(0.5)}}}]
        },
        "clinic": {
            "models": {
                "sft": {"figures": {"diagnosis_right": figure(0.6875, num_prompts=8)}},
                "ppo": {"figures": {"diagnosis_right": None}},
            }
        },
    }
    result = {
        "models": dict.fromkeys(names, {}),
        "judge": {"judge": "another|judge"},
        "settings": {"limit": 20, "temperature": 0.0, "max_new_tokens": 64},
        "versions": {"huatuo_jax": "1.2.3"},
        "suites": suites,
    }
    write(folder, "suites/evaluation.json", result)
    journal = json.loads((folder / "recipe.json").read_text("utf-8"))
    write(folder, "recipe.json", journal | {"suites": {"finished": "now", "result": {}}})


def test_the_figures_of_the_suites_are_read_back_with_interval_set_judge_number_and_version(
    workdir,
):
    write_suites(workdir)

    def read(name):
        return ModelCard(policy(workdir, name, num_samples=0))

    card = read("sft")
    found = [one for one in card.data.eval_results if one.dataset_type != "held-out"]
    told = {
        (one.dataset_type, one.dataset_config, one.dataset_name, one.metric_type): one
        for one in found
    }
    world = "huatuo_jax's clinic, an invented world"
    accuracy = "accuracy_by_generation"
    assert {key: one.metric_value for key, one in told.items()} == {
        ("exams", "cmmlu", "CMMLU, medical subjects", accuracy): 0.3125,
        ("exams", "my|set", "my|set", accuracy): 0.2812,
        ("single_turn", None, "KUAKE-QIC", "win_share"): 0.5,
        ("clinic", None, world, "diagnosis_right"): 0.6875,
    }
    judged = told["single_turn", None, "KUAKE-QIC", "win_share"]
    assert judged.metric_name == "questions: wins against ppo"
    assert judged.dataset_args == {"limit": 20}
    assert judged.metric_args == {
        "low": 0.4,
        "high": 0.6,
        "confidence": 0.95,
        "num_items": 9,
        "judge": "another|judge",
        "huatuo_jax": "1.2.3",
    }
    assert "judge" not in told["clinic", None, world, "diagnosis_right"].metric_args
    # No figure of a model that has none, and the single responses of SFT for its best-of-n.
    values = [one.metric_value for one in read("ppo").data.eval_results]
    assert 0.4375 in values and 0.6875 not in values and 0.3125 not in values
    values = [one.metric_value for one in read("best_of_n").data.eval_results]
    assert 0.3125 in values and 0.6875 in values
    assert not any(one.dataset_type == "exams" for one in read("base").data.eval_results)


def test_the_card_shows_the_suites_of_all_models_in_a_table(workdir):
    write_suites(workdir)
    card = policy(workdir, "sft", num_samples=0)
    assert "## On exams, questions and consultations" in card
    row = next(line for line in card.splitlines() if line.startswith("| cmmlu: accuracy"))
    assert row == (
        "| cmmlu: accuracy by generation, percent | CMMLU, medical subjects | 20 "
        "| 31.2 (25.0 to 50.0) | 43.8 (25.0 to 50.0) |"
    )
    assert "At most 20 items of each set were drawn." in card
    assert "huatuo_jax 1.2.3" in card and "another\\|judge is a language model" in card
