"""Each check of a run's inputs by itself: what passes, what is refused, and with which message."""

import json
import pathlib

import jax
import pytest

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import init_params
from huatuo_jax.checkpoint.models import save_orbax
from huatuo_jax.core.config import replaced
from huatuo_jax.preferences.data import ComparisonSource
from huatuo_jax.recipe import checks
from huatuo_jax.recipe.checks import check_inputs
from huatuo_jax.recipe.config import STAGES
from huatuo_jax.recipe.prompts import make_prompts, write_prompts
from huatuo_jax.reward.config import ProbeConfig
from tests.recipe.tiny import BACKBONE, TOKENIZER, tiny_recipe, write_dialogues


@pytest.fixture
def workdir(tmp_path):
    """A run's folder with the prompts that the recipe writes before its checks."""
    write_dialogues(tmp_path / "mine.jsonl")
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = tiny_recipe(tmp_path / "mine.jsonl").in_workdir(folder)
    prompts = make_prompts(cfg.sft.data, cfg.prompts, num_judged=cfg.num_judged_prompts(folder))
    write_prompts(folder / "prompts.jsonl", prompts.train)
    write_prompts(folder / "held_out_prompts.jsonl", prompts.held_out)
    write_prompts(folder / "judged_prompts.jsonl", prompts.judged)
    return folder


def check(workdir, wanted=STAGES, **changes):
    """Checks the tiny recipe with fields changed, dots of a path as double underscores."""
    cfg = tiny_recipe(workdir.parent / "mine.jsonl")
    cfg = replaced(cfg, {name.replace("__", "."): value for name, value in changes.items()})
    check_inputs(cfg.in_workdir(workdir), workdir, set(wanted))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reward model from elsewhere with the run's tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, head in (("policy", "lm"), ("scores", "score")):
        params = init_params(jax.random.key(0), BACKBONE, ComputeConfig(), head=head)
        source = pathlib.Path(TOKENIZER)
        save_orbax(params, BACKBONE, folder / name, head=head, source_folder=source)
    return folder


def comparison(**changed):
    row = {
        "id": "p",
        "messages": [{"role": "user", "content": "头痛怎么办？"}],
        "chosen": [{"role": "assistant", "content": "多休息。"}],
        "rejected": [{"role": "assistant", "content": "不知道。"}],
        "p_chosen": 0.75,
        "source": "mine",
    }
    return json.dumps(row | changed, ensure_ascii=False) + "\n"


def test_all_stages_of_a_fresh_run_pass_though_nothing_of_the_run_is_there(workdir):
    check(workdir, STAGES)


def test_stages_that_are_finished_are_not_checked(workdir):
    broken = {"sft__data__row_length": 4096, "answers__model": "nowhere"}
    check(workdir, {"report"}, **broken)
    check(workdir, set(), **broken)
    with pytest.raises(ValueError, match="row_length=4096"):
        check(workdir, **broken)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("sft__data__row_length", "sft.data.row_length=257"),
        ("reward__data__max_length", "reward.data.max_length=257"),
        ("ppo__data__max_prompt_tokens", "ppo.data.max_prompt_tokens + rollout=257"),
    ],
)
def test_lengths_may_reach_the_models_positions_and_no_further(workdir, field, told):
    longest = 256 - 12 if "prompt_tokens" in field else 256
    rows = {"reward__data__row_length": 1024}  # Both responses of a pair are in one row.
    check(workdir, **{field: longest}, **rows)
    with pytest.raises(ValueError) as error:
        check(workdir, **{field: longest + 1}, **rows)
    assert str(error.value) == f"config.{told} must be at most the model's 256 positions"


MODEL_FIELDS = [
    ("answers__model", "policy"),
    ("ppo__model__directory", "policy"),
    ("ppo__reward_model", "scores"),
    ("evaluation__base", "policy"),
    ("evaluation__sft", "policy"),
    ("evaluation__ppo", "policy"),
    ("evaluation__reward", "scores"),
    ("export__policy", "policy"),
    ("export__reward", "scores"),
]


def with_model(field, value):
    """The change of a field, and of those that must agree with it."""
    alone = {"evaluation__reward", "export__reward"}
    return {field: value} | ({"export__policy": "ppo"} if field in alone else {})


@pytest.mark.parametrize(("field", "right"), MODEL_FIELDS)
def test_a_model_from_elsewhere_needs_the_head_of_its_role(workdir, models, field, right):
    check(workdir, **with_model(field, str(models / right)))
    wrong = str(models / ("scores" if right == "policy" else "policy"))
    with pytest.raises(ValueError) as error:
        check(workdir, **with_model(field, wrong))
    role = "a model with a token head" if right == "policy" else "a reward model, with a score head"
    assert str(error.value) == f"config.{field.replace('__', '.')}={wrong!r} must be {role}"


@pytest.mark.parametrize("head", ["policy", "scores"])
def test_a_reward_model_may_start_from_either_head(workdir, models, head):
    check(workdir, reward__model__directory=str(models / head))


@pytest.mark.parametrize("field", [field for field, _ in MODEL_FIELDS])
def test_a_model_that_does_not_exist_is_named_by_its_field(workdir, field):
    with pytest.raises(FileNotFoundError) as error:
        check(workdir, **with_model(field, "nowhere/model"))
    said = str(error.value)
    assert said.startswith(f"config.{field.replace('__', '.')}: ") and "nowhere/model" in said
    assert ("or one of released, base, sft" in said) == (field == "export__policy")


def test_a_model_that_this_run_will_write_may_be_absent_and_no_other(workdir):
    check(workdir, {"sft", "answers"})
    with pytest.raises(FileNotFoundError, match=r"^config\.answers\.model: .*sft/model"):
        check(workdir, {"answers"})


def test_files_of_comparisons_and_probes_must_hold_comparisons(workdir):
    path = workdir.parent / "pairs.jsonl"
    sources = (ComparisonSource(paths=(str(path),)),)
    probes = (ProbeConfig(name="own", paths=(str(path),), chosen="true"),)
    for change in ({"reward__data__sources": sources}, {"reward__probes": probes}):
        path.unlink(missing_ok=True)
        with pytest.raises((ValueError, OSError), match=r"pairs\.jsonl"):
            check(workdir, **change)
        path.write_text(comparison(chosen=3), encoding="utf-8")
        with pytest.raises(ValueError, match=r"pairs\.jsonl"):
            check(workdir, **change)
        path.write_text(comparison(), encoding="utf-8")
        check(workdir, **change)


def test_an_answers_file_is_read_unless_this_run_will_write_it(workdir):
    check(workdir)
    with pytest.raises(ValueError, match=r"answers\.jsonl: no such file"):
        check(workdir, {"labels"})
    own = workdir.parent / "own.jsonl"
    own.write_text('{"id": "p"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"own\.jsonl:1"):
        check(workdir, labels__answers=str(own))


@pytest.mark.parametrize("stage", ["answers", "evaluation"])
def test_a_file_of_prompts_must_exist_and_leave_room_for_a_response(workdir, stage):
    path = workdir.parent / "own_prompts.jsonl"
    change = {f"{stage}__prompts": str(path)}
    with pytest.raises((ValueError, OSError), match=r"own_prompts\.jsonl"):
        check(workdir, **change)
    path.write_text('{"id": "a", "question": "头痛怎么办？"}\n', encoding="utf-8")
    check(workdir, **change)
    rows = [{"id": str(index), "question": f"{index}头痛怎么办？"} for index in range(8)]
    rows += [{"id": f"long{one}", "question": one * 400} for one in "咳胃"]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        check(workdir, **change)
    said = str(error.value)
    assert f"config.{stage}.max_left_out_share=0.1" in said
    assert "the model's 256 positions" in said and "own_prompts.jsonl:9" in said


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_micro_batches_must_divide_over_the_devices(workdir, stage):
    check(workdir, **{f"{stage}__micro_batch_size": 8})
    with pytest.raises(ValueError, match=rf"^config\.{stage}\.micro_batch_size=4 rows must be a "):
        check(workdir, **{f"{stage}__micro_batch_size": 4})


def test_an_export_says_where_its_template_gives_other_tokens_than_training(
    workdir, capsys, monkeypatch
):
    for gives, lines in ((True, 0), (False, 1)):
        monkeypatch.setattr(checks, "gives_the_tokens", lambda *_, gives=gives: gives)
        check(workdir)
        said = capsys.readouterr().out
        assert said.count("export: with this tokenizer (") == lines
        check(workdir, set(STAGES) - {"export"})
        assert "export:" not in capsys.readouterr().out
    assert "'huatuogpt' gives the text of training, but tokens that reach over the border" in said


def test_the_checks_leave_the_runs_folder_as_it_was(workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    check(workdir, STAGES)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
