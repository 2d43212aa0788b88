"""The experiment on the paper's claims: what verdicts follow from, its parts, and a tiny run."""

import importlib
import json
import math
import pathlib
import subprocess
import sys

import pytest

from huatuo_jax.clinic.dialogues import prompts
from huatuo_jax.clinic.judge import ClinicJudge
from huatuo_jax.core import command_line
from huatuo_jax.core.config import checked
from huatuo_jax.judge.questions import Answered
from huatuo_jax.ppo.config import JudgingConfig
from huatuo_jax.recipe.config import RlaifConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def modules():
    """The modules of the experiment, whose command has its folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        names = ("parts", "figures", "page")
        found = {name: importlib.import_module(f"paper_claims_{name}") for name in names}
        yield found | {"command": importlib.import_module("paper_claims")}


@pytest.fixture(scope="module")
def parts(modules):
    return modules["parts"]


@pytest.fixture(scope="module")
def figures(modules):
    return modules["figures"]


@pytest.fixture(scope="module")
def card(parts):
    return parts.read_card(parts.TINY)


def test_over_seeds_a_figure_is_the_mean_with_students_interval(figures):
    # Student's quantiles of 1 and 2 degrees of freedom have closed forms.
    two = figures.over_seeds([0.4, 0.6])
    half = math.tan(math.pi * 0.475) * math.sqrt(0.02) / math.sqrt(2)
    assert (two["mean"], two["num_seeds"]) == (pytest.approx(0.5), 2)
    assert (two["low"], two["high"]) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    three = figures.over_seeds([1.0, 2.0, 3.0])
    half = 0.95 / math.sqrt(2 * 0.975 * 0.025) * 1.0 / math.sqrt(3)
    assert (three["low"], three["high"]) == (pytest.approx(2 - half), pytest.approx(2 + half))


def test_one_seed_has_no_interval_and_decides_nothing(figures):
    one = figures.over_seeds([0.9])
    assert one == {"mean": 0.9, "low": None, "high": None, "num_seeds": 1}
    assert figures.verdict_of(one, bound=0.5) == "undecided"
    assert figures.verdict_of(None, bound=0.5) == "undecided"
    with pytest.raises(ValueError, match="at least one seed"):
        figures.over_seeds([])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.51, 0.7, "holds"),
        (0.3, 0.49, "does not hold"),
        (0.4, 0.6, "undecided"),
        (0.5, 0.7, "undecided"),
        (0.3, 0.5, "undecided"),
    ],
)
def test_a_verdict_follows_from_where_the_interval_lies(figures, low, high, verdict):
    figure = {"mean": (low + high) / 2, "low": low, "high": high, "num_seeds": 5}
    assert figures.verdict_of(figure, bound=0.5) == verdict


def test_a_claim_of_several_conditions_needs_all_of_them(figures):
    assert figures.verdict_of_all(["holds", "holds"]) == "holds"
    assert figures.verdict_of_all(["holds", "undecided"]) == "undecided"
    assert figures.verdict_of_all(["undecided", "does not hold", "holds"]) == "does not hold"
    assert figures.verdict_of_all([]) == "undecided"


def test_the_claims_are_judged_by_the_figures_and_by_nothing_else(figures):
    def comparisons(low, high):
        found = {"mean": (low + high) / 2, "low": low, "high": high, "num_seeds": 5}
        names = (figures.SHARE, *figures.OUTCOMES)
        return [
            {"one": list(one), "other": list(other), "figures": dict.fromkeys(names, found)}
            for one, other in figures.pairs_of_claims()
        ]

    def verdicts(rows):
        return {one["verdict"] for one in figures.verdicts_on_claims(rows)}

    assert verdicts(comparisons(0.6, 0.7)) == {"holds"}
    assert verdicts(comparisons(-0.9, -0.8)) == {"does not hold"}
    assert verdicts(comparisons(-0.9, 0.9)) == verdicts([]) == {"undecided"}


def test_models_are_compared_prompt_by_prompt_before_the_exact_judge(figures):
    asked = list(prompts(30, seed=0))
    doctor, silent = figures.Model("both", "ppo"), figures.Model("both", "sft")
    texts = {
        doctor: [Answered(one, (one.reference,)) for one in asked],
        silent: [Answered(one, ("",)) for one in asked],
    }
    pairs = [(doctor, silent), (doctor, doctor), (doctor, figures.Model("real", "ppo"))]
    found = figures.compare_all(texts, pairs, seed=0)
    assert list(found) == pairs[:2]
    assert found[doctor, silent][figures.SHARE]["value"] == 1.0
    assert found[doctor, silent]["diagnosis_accuracy"]["value"] == 1.0
    same = found[doctor, doctor]
    assert (same[figures.SHARE]["value"], same["overall"]["high"]) == (0.5, 0.0)
    with pytest.raises(ValueError, match="different prompts"):
        figures.compare_all({**texts, silent: texts[silent][1:]}, pairs[:1], seed=0)


def test_seeds_below_are_counted_by_value_and_by_whole_interval(figures):
    seeds = [(-0.2, -0.1), (-0.1, 0.05), (0.1, 0.2)]
    figure = {"seeds": {i: {"value": v, "high": h} for i, (v, h) in enumerate(seeds)}}
    assert figures.seeds_below(figure) == {"value": 2, "interval": 1}


def test_a_part_takes_what_comes_before_its_first_change_from_both(parts, card, tmp_path):
    cfg = parts.branch(card, tmp_path, {"judge.clinic_judge": ClinicJudge(length_bias=1.0)})
    assert cfg.stages == ("labels", "reward", "ppo", "evaluation")
    assert cfg.labels.answers == cfg.reward.normalization_answers == f"{tmp_path}/answers.jsonl"
    assert cfg.reward.model.directory == cfg.evaluation.sft == f"{tmp_path}/sft/model"
    assert cfg.reward.data.sources[0].paths == ("{workdir}/comparisons.jsonl",)
    assert cfg.ppo.reward_model == cfg.export.reward == "{workdir}/reward/model"
    assert cfg.evaluation.prompts == f"{tmp_path}/held_out_prompts.jsonl"
    assert cfg.evaluation.base == f"{tmp_path}/base/model"
    later = parts.branch(card, tmp_path, parts.CONTROLS["length_alone"])
    assert later.stages == ("ppo", "evaluation")
    assert later.ppo.reward_model == later.evaluation.reward == f"{tmp_path}/reward/model"
    assert (later.ppo.score.of, later.ppo.judging) == ("length", None)
    assert checked(later, RlaifConfig, path="config") == later


@pytest.mark.parametrize("changes", [{}, {"sft.seed": 1}, {"clinic.seed": 1}])
def test_what_all_branches_share_is_not_changed(parts, card, tmp_path, changes):
    with pytest.raises(ValueError, match="must be of answers, labels, reward, ppo"):
        parts.branch(card, tmp_path, changes)


def test_a_branch_that_is_judged_has_the_prompts_that_were_set_aside(parts, card, tmp_path):
    judged = parts.replaced(card, {"ppo.judging": JudgingConfig()})
    cfg = parts.branch(judged, tmp_path, {"ppo.kl_coef": 0.5})
    assert cfg.ppo.judging.prompts == f"{tmp_path}/judged_prompts.jsonl"
    unjudged = parts.replaced(card, {"ppo.judging": None})
    with pytest.raises(ValueError, match="ppo.judging"):
        parts.branch(unjudged, tmp_path, {"ppo.judging": JudgingConfig()})


def test_distilled_and_real_data_have_as_many_updates_as_both(parts, card, tmp_path):
    for part in parts.claims_parts()[1:3]:
        cfg = parts.recipe_of(part, card, tmp_path, sft_steps=7)
        assert cfg.sft.num_steps == 7 and cfg.stages == parts.STAGES
        kinds = {source.kind for source in cfg.sft.data.sources}
        assert kinds == set(part.kinds) and len(kinds) == 2
        assert all(kind.startswith(part.name) for kind in kinds)


def test_a_seed_is_that_of_the_clinic_and_of_all_that_is_random(parts, card):
    cfg = parts.with_seed(card, 3)
    seeds = (cfg.clinic, cfg.sft, cfg.answers, cfg.labels.comparison, cfg.reward, cfg.ppo)
    assert {one.seed for one in seeds} == {cfg.evaluation.seed} == {3}


def test_a_change_that_the_card_does_not_have_is_no_row_of_the_table(parts, card):
    ablations = {
        "kl": {"ppo.kl_coef": card.ppo.kl_coef},
        "epochs": {"reward.num_epochs": card.reward.num_epochs + 1},
    }
    found, undone = parts.contributions_parts(card, ablations)
    assert [part.name for part in found] == ["both", "without_epochs"] and undone == ["kl"]
    with pytest.raises(ValueError, match="RewardConfig has no field 'epochs'"):
        parts.contributions_parts(card, {"epochs": {"reward.epochs": 2}})


def test_every_named_change_is_one_of_the_recipe(parts, card, tmp_path):
    for changes in (*parts.CONTROLS.values(), *parts.ABLATIONS.values()):
        parts.branch(card, tmp_path, changes)
    with pytest.raises(ValueError, match="must be some of"):
        parts.chosen_parts(parts.claims_parts(), ["distiled"])
    chosen = parts.chosen_parts(parts.claims_parts(), ["real"])
    assert [part.name for part in chosen] == ["both", "real"]


def experiment(*flags):
    done = subprocess.run(
        [sys.executable, "benchmarks/paper_claims.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done


@pytest.mark.slow
def test_a_tiny_run_fills_the_tables_and_goes_on_where_it_stands(tmp_path):
    output, where = tmp_path / "found.json", f"--workdir={tmp_path / 'runs'}"
    flags = ("--tiny", where, f"--output={output}", "--seeds=0,1", "--parts=distilled,length_alone")
    done = experiment(*flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    rows = {(row["part"], row["model"]): row["figures"] for row in found["claims"]["rows"]}
    assert set(rows) == {
        ("both", "reference"),
        ("both", "sft"),
        ("both", "best_of_n"),
        ("both", "ppo"),
        ("distilled", "sft"),
        ("distilled", "ppo"),
        ("length_alone", "ppo"),
    }
    assert rows["both", "reference"]["diagnosis_accuracy"]["mean"] > 0.9
    assert rows["both", "ppo"]["kl"]["num_seeds"] == 2
    verdicts = {one["name"]: one["verdict"] for one in found["claims"]["claims"]}
    assert verdicts["both_over_real"] == "undecided"  # It was not run.

    before = output.read_text(encoding="utf-8")
    again = experiment(*flags)
    assert again.returncode == 0, again.stderr
    assert "about 0 min left" in again.stdout and "finished before" in again.stdout
    timeless = [
        json.loads(text)["claims"] | {"versions": None} for text in (before, output.read_text())
    ]
    assert timeless[0] == timeless[1]

    done = experiment("--tiny", where, f"--output={output}", "--seeds=0", "--table=contributions")
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text(encoding="utf-8"))
    assert set(found) == {"claims", "contributions"}
    assert "ppo" in {row["model"] for row in found["contributions"]["rows"]}

    page = tmp_path / "docs" / "page.md"
    done = experiment(f"--output={output}", f"--page={page}")
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert "undecided: these seeds do not tell" in text and "](../found.png)" in text
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(ROOT) not in output.read_text(encoding="utf-8") + text


def test_the_page_in_the_documentation_is_made_of_the_results_as_they_stand(modules):
    results = ROOT / "benchmarks" / "results" / "paper_claims.json"
    found = json.loads(results.read_text(encoding="utf-8"))
    made = modules["page"].page(found, plot="../benchmarks/results/paper_claims.png")
    assert (ROOT / "docs" / "paper_claims.md").read_text(encoding="utf-8") == made
    assert found["claims"]["tiny"] is False


def test_a_page_without_figures_is_refused_in_a_line(modules, tmp_path, capsys):
    output, command = tmp_path / "none.json", modules["command"]
    output.write_text("{}")
    arguments = [f"--output={output}", f"--page={tmp_path / 'page.md'}"]
    with pytest.raises(SystemExit, match="^1$"):
        command_line.run(command.main, command.Flags, arguments=arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "run the experiment first" in error
