"""A page made of a run's files: it holds their numbers, needs nothing beside it, and is safe."""

import ast
import html.parser
import json
import pathlib
import re
from collections import Counter

import pytest

from huatuo_jax.clinic.dialogues import prompts
from huatuo_jax.data.accounting import Account
from huatuo_jax.report import page as page_module
from huatuo_jax.report import plots
from huatuo_jax.report.page import write_report
from tests.tiny import write_rows

TEXT = "咳嗽三天<b>怎么办</b>？"


def interval(value):
    return {"value": value, "low": value - 0.25, "high": value + 0.25, "num_prompts": 2}


def evaluation(*, gain=0.8125, low=None):
    fields = {
        name: interval(value)
        for name, value in (
            ("reward", 0.53125),
            ("characters", 41.5),
            ("stopped", 0.875),
            ("judge_overall", 2.75),
            ("judge_accurate", 1.25),
        )
    }
    model = fields | {"distinct_1": 0.75, "distinct_2": 0.9375, "unscored": 0}
    rewards = interval(gain) | ({} if low is None else {"low": low})
    difference = {"reward": rewards, "judge_overall": interval(0.5), "characters": interval(3.0)}
    won = {"wins": 5, "ties": 1, "losses": 2, "share": interval(0.6875), "orders_disagree": 0}
    pairs = ("sft_over_base", "ppo_over_sft", "ppo_over_base")
    return {
        "num_prompts": 2,
        "judge": "offline-rubric-v1",
        "models": {name: model for name in ("base", "sft", "ppo")},
        "differences": dict.fromkeys(pairs, difference),
        "win_rates": dict.fromkeys(pairs, won),
        "length": {
            "reward_per_character": 0.01,
            "gain_by_length": interval(0.0625),
            "gain_at_equal_length": interval(0.75),
        },
        "held_out_loss": {
            name: {"eval/loss": loss}
            for name, loss in (("base", 8.0), ("sft", 4.5), ("ppo", 4.625))
        },
        "kl": {"per_sequence": interval(3.375), "per_token": 0.09375, "num_answers": 4},
        "sampling": {"num_samples": 2, "max_new_tokens": 9, "temperature": 1.0, "seed": 0},
    }


def released(*, pick="sft", share=0.5, warnings=(), truth=None):
    """A decision; all shares are alike."""
    pairs = ("sft_over_base", "ppo_over_sft", "best_of_n_over_ppo")
    shown = {"share": interval(share), "failed": 3, "preferred": "too few prompts"}
    return {
        "pick": pick,
        "reason": f"{pick} is released: so says <the judge>.",
        "judge": "offline-rubric-v1",
        "comparisons": dict.fromkeys(pairs, shown)
        | {"best_of_n_over_sft": {"share": None, "failed": 8, "preferred": "best_of_n"}},
        "best_of_n": {"n": 4, "kl_upper_bound": 0.63671875},
        "truth": truth,
        "warnings": list(warnings),
    }


def reward_report():
    accuracy = {"value": 0.78125, "low": 0.7, "high": 0.85, "num_pairs": 64, "num_cases": 9}
    bins = [
        {"low": 0.5, "high": 0.55, "num_pairs": 40, "confidence": 0.52, "agreement": 0.6},
        {"low": 0.9, "high": 0.95, "num_pairs": 24, "confidence": 0.93, "agreement": 0.9},
    ]
    calibration = {"expected_calibration_error": 0.0625, "bins": bins}
    return {
        "num_pairs": 64,
        "num_cases": 9,
        "accuracy": accuracy,
        "loss": 0.4,
        "calibration": calibration,
        "length_baseline": {
            "accuracy": accuracy | {"value": 0.515625},
            "loss": 0.69,
            "calibration": calibration,
        },
        "accuracy_above_length_baseline": accuracy | {"value": 0.265625},
        "score_length_correlation": {"all_answers": 0.25, "within_prompts": None},
        "accuracy_by_margin": [{"margin_low": 0.1, "margin_high": 0.5} | accuracy],
    }


def labels_report():
    def figure(value):
        return {"value": value, "standard_error": None, "num_items": 8}

    return {
        "judges": [
            {
                "judge": "offline-rubric-v1",
                "protocol": "score",
                "judgements": 976,
                "failure_rate": figure(0.0),
                "ties": figure(0.125),
                "longer_wins": figure(0.515625),
                "position": None,
                "scores": {"overall": figure(2.875)},
                "cost": {"money": 0.0, "unknown": 0, "usage": {}, "latency_s": None},
            }
        ]
    }


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def metrics(stage, steps, **fields):
    return [
        {"step": step, "time_s": 0.0, "stage": stage}
        | {f"{stage_name.replace('__', '/')}": value + step for stage_name, value in fields.items()}
        for step in range(1, steps + 1)
    ]


def entry(seconds, **result):
    return {
        "settings": {"seed": 0, "nested": {"batch_size": 8}},
        "inputs": {"model": "abc"},
        "starts": ["2030-01-01T00:00:00+00:00"],
        "seconds": seconds,
        "finished": "2030-01-01T00:01:00+00:00",
        "result": result,
    }


@pytest.fixture(scope="module", autouse=True)
def plots_drawn_once():
    """The pages differ in a few numbers: a plot that another page has too is not drawn again."""

    def once(draw):
        drawn = {}

        def find(*data, **options):
            key = json.dumps([data, options])
            if key not in drawn:
                drawn[key] = draw(*data, **options)
            return drawn[key]

        return find

    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "scatter", "clouds", "reliability", "reward_and_judge"):
            patch.setattr(plots, name, once(getattr(plots, name)))
        yield


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "demo"
    write(folder / "recipe.json", {"sft": entry(61.5, step=3), "ppo": entry(30.25, step=2)})
    write(folder / "evaluation.json", evaluation())
    write(folder / "labels.jsonl.report.json", labels_report())
    write(folder / "reward" / "reward_report.json", reward_report())
    rows = metrics("sft", 80, train__loss=5.0) + metrics("sft", 2, eval__loss=6.0)
    write_rows(folder / "sft" / "metrics.jsonl", rows)
    gauges = {"score": 0.5, "kl_per_sequence": 1.0, "response_length": 30.0, "sampled_entropy": 2.0}
    named = {f"ppo__{name}": value for name, value in gauges.items()}
    write_rows(folder / "ppo" / "metrics.jsonl", metrics("ppo", 4, **named))
    for name in ("base", "sft", "ppo"):
        records = [
            {
                "id": f"p{index}",
                "messages": [{"role": "user", "content": TEXT}],
                "answers": [{"text": f"{name}说：多喝水。", "finish_reason": "length"}],
                "normalized_scores": [0.40625],
                "rewards": [0.40625],
            }
            for index in range(2)
        ]
        write_rows(folder / "evaluation" / f"scored_{name}.jsonl", records)
    return folder


def page_of(folder):
    write_report(folder, folder / "report.html", title="Trial & error", num_prompts=2)
    return (folder / "report.html").read_text(encoding="utf-8")


def named_numbers(page):
    found = re.findall(r'<data value="([^"]+)" data-name="([^"]+)">', page)
    return {name: float(value) for value, name in found}


def test_the_numbers_of_the_run_can_be_read_back_from_the_page(run):
    numbers = named_numbers(page_of(run))
    assert numbers["reward_gain"] == 0.8125
    assert numbers["kl_per_sequence"] == 3.375
    assert numbers["held_out_loss_base"] == 8 and numbers["held_out_loss_ppo"] == 4.625
    assert numbers["reward_accuracy"] == 0.78125 and numbers["length_accuracy"] == 0.515625
    assert numbers["gain_at_equal_length"] == 0.75
    assert numbers["longer_wins"] == 0.515625 and numbers["judgements"] == 976
    assert numbers["sft_characters"] == 41.5 and numbers["ppo_judge_overall"] == 2.75


def test_the_page_needs_nothing_beside_it(run):
    page = page_of(run)
    assert not re.search(r"<(?:script|link|img|iframe)\b", page)
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#|"#)(?:https?:|//|/)""", page)
    assert "@import" not in page


def test_texts_of_the_data_show_as_text_and_not_as_markup(run):
    page = page_of(run)
    assert "咳嗽三天&lt;b&gt;怎么办&lt;/b&gt;？" in page and TEXT not in page
    assert "Trial &amp; error" in page
    assert "ppo说：多喝水。" in page and page.count("cut off at its length limit") == 6


def test_every_id_stands_once_and_every_reference_has_one(run):
    page = page_of(run)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert references and set(references) <= set(ids)


def test_tags_are_closed_in_order(run):
    class Tags(html.parser.HTMLParser):
        open_ones: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "br", "hr"):
                self.open_ones.append(tag)

        def handle_endtag(self, tag):
            assert self.open_ones.pop() == tag

    parser = Tags()
    parser.feed(page_of(run))
    assert parser.open_ones == []


def test_what_the_offline_judge_is_and_is_not_stands_on_the_page(run):
    page = page_of(run)
    assert "is no substitute for a judge that reads" in page
    report = labels_report()
    report["judges"][0]["judge"] = "some-model"
    write(run / "labels.jsonl.report.json", report)
    assert "is no substitute for a judge that reads" not in page_of(run)


@pytest.mark.parametrize(
    ("gain", "low", "told"),
    [
        (0.8, 0.1, "score higher than SFT's, outside"),
        (0.1, -0.2, "score alike within"),
        (-0.8, -1.2, "score lower than SFT's, outside"),
    ],
)
def test_the_verdict_says_what_the_interval_says(run, gain, low, told):
    write(run / "evaluation.json", evaluation(gain=gain, low=low))
    assert told in page_of(run)


def judged_rows(*points):
    """Rows of judgings: step, KL, reward and share."""
    return [
        {
            "step": step,
            "judged/kl_per_sequence": divergence,
            "judged/reward": reward,
            "judged/share": share,
            "judged/share_low": share - 0.0625,
            "judged/share_high": share + 0.0625,
            "judged/cost": 0.5,
        }
        for step, divergence, reward, share in points
    ]


def test_a_judged_run_says_what_was_kept_and_why_it_ended(run):
    rows = judged_rows((0, 0.0, 0.1, 0.5), (2, 1.5, 0.4, 0.6875), (4, 3.0, 0.9, 0.4375))
    path = run / "ppo" / "metrics.jsonl"
    text = path.read_text() + "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    ended = "the judge turned at iteration 4 while the reward rose from 0.400 to 0.900"
    result = {"kept_iteration": 2, "best_is_initial": False, "ended": ended}
    write(run / "recipe.json", {"ppo": entry(30.25, step=4, **result)})
    page = page_of(run)
    numbers = named_numbers(page)
    assert numbers["kept_iteration"] == 2 and numbers["kept_share"] == 0.6875
    assert f"The run ended early: {ended}." in page and 'aria-label="judged"' in page
    assert "kept: iteration 2" in page and "score-kl" not in page
    assert page.index('aria-label="judged"') < page.index('aria-label="score-length"')
    assert "does not prefer any" not in page
    result |= {"best_is_initial": True, "ended": "all iterations"}
    write(run / "recipe.json", {"ppo": entry(30.25, step=4, **result)})
    page = page_of(run)
    assert "does not prefer any" in page and "ended after all iterations" in page


def test_what_is_released_stands_first_with_its_reason_and_its_comparisons(run):
    assert 'id="release"' not in page_of(run)
    truth = {
        "diagnosis_right": {
            "words": "names the right disease",
            "pick": interval(0.25),
            "sft": interval(0.75),
            "difference": interval(-0.5),
        }
    }
    decided = released(pick="ppo", share=0.6875, warnings=["Truth fell."], truth=truth)
    write(run / "evaluation.json", evaluation() | {"release": decided})
    page = page_of(run)
    assert page.index('id="release"') < page.index('id="curves"')
    assert "ppo is released: so says &lt;the judge&gt;." in page and "Truth fell." in page
    assert named_numbers(page)["release_ppo_over_sft"] == 0.6875
    assert "best-of-n over SFT</th><td>–</td><td>best-of-n</td>" in page
    assert "<td>too few prompts</td>" in page
    assert "<th scope=row>names the right disease</th>" in page and "−0.500" in page


def test_what_was_exported_all_the_same_stands_in_place_of_the_reason(run):
    write(run / "evaluation.json", evaluation() | {"release": released()})
    told = {"policy": "ppo", "sentence": "config.export.policy='ppo' is exported."}
    write(run / "export" / "release.json", told)
    page = page_of(run)
    assert "config.export.policy=&#39;ppo&#39; is exported." in page
    assert "so says" not in page
    (run / "evaluation.json").unlink()
    assert "config.export.policy=&#39;ppo&#39; is exported." in page_of(run)


def test_best_of_n_has_its_column_and_its_answers(run):
    found = evaluation()
    found["models"]["best_of_n"] = found["models"]["sft"]
    write(run / "evaluation.json", found)
    records = (run / "evaluation" / "scored_sft.jsonl").read_text(encoding="utf-8")
    (run / "evaluation" / "scored_best_of_n.jsonl").write_text(records.replace("sft说", "最好"))
    page = page_of(run)
    assert "<th>SFT</th><th>best-of-n</th><th>PPO</th>" in page
    assert "最好：多喝水。" in page and "<h4>best-of-n</h4>" in page


@pytest.mark.parametrize(
    ("gain", "truth", "contraindicated", "told"),
    [
        (
            0.8,
            -0.5,
            0.0,
            "Reward rose and truth fell:</strong> PPO names the right disease less",
        ),
        (
            0.8,
            0.0,
            0.5,
            "Reward rose and truth fell:</strong> PPO orders what the patient must",
        ),
        (0.8, 0.5, 0.0, "Reward and truth rose:</strong> PPO names the right disease more often"),
        (0.8, 0.0, 0.0, "Reward rose and truth did not:</strong> PPO's answers are neither truer"),
        (-0.8, -0.5, 0.0, "<strong>Truth fell:</strong> PPO names the right disease less often"),
        (-0.8, 0.0, 0.0, "<p>PPO's answers are neither truer nor less true"),
    ],
)
def test_the_verdict_begins_with_truth_where_it_is_known(run, gain, truth, contraindicated, told):
    found = with_truth(evaluation(gain=gain))
    differences = found["differences"]["ppo_over_sft"]
    differences["truth_diagnosis_right"] = interval(truth)
    differences["truth_contraindicated"] = interval(contraindicated)
    write(run / "evaluation.json", found)
    assert told in page_of(run)


def with_truth(found):
    """An evaluation whose judge knows the truth."""
    shares = {"base": 0.0, "sft": 0.625, "ppo": 0.375, "reference": 1.0}
    found["models"] = {
        name: found["models"]["sft"] | {"truth_diagnosis_right": interval(share)}
        for name, share in shares.items()
    }
    return found


def test_truth_stands_before_judge_and_reward(run):
    assert "Right disease" not in page_of(run)
    write(run / "evaluation.json", with_truth(evaluation()))
    page = page_of(run)
    numbers = named_numbers(page)
    assert numbers["right_disease_sft"] == 62.5 and numbers["right_disease_reference"] == 100.0
    shown = ("Right disease: base", "Right disease: PPO", "Judge prefers PPO", "Reward, PPO over")
    places = [page.index(one) for one in shown]
    assert places == sorted(places)


def test_pairs_that_differ_in_one_thing_have_a_table(run):
    report = reward_report()
    share = report["accuracy"]
    report["probes"] = [
        {
            "name": name,
            "chosen": chosen,
            "neutral": neutral,
            "accuracy": share | {"value": value},
            "length_accuracy": share,
        }
        for name, chosen, neutral, value in (
            ("truth", "true", False, 0.84375),
            ("length", "longer<b>", True, 0.5625),
        )
    ]
    write(run / "reward" / "reward_report.json", report)
    page = page_of(run)
    numbers = named_numbers(page)
    assert (numbers["probe_truth"], numbers["probe_length"]) == (0.84375, 0.5625)
    assert "the longer&lt;b&gt; one (neither is right)" in page and ".5 is indifference" in page


def test_consultations_are_shown_where_the_clinic_asked_and_nowhere_else(run):
    assert "consultations" not in page_of(run)
    asked = list(prompts(30, seed=0, held_out=True))
    for name in ("sft", "ppo", "reference"):
        rows = [
            one.to_json() | {"answers": [{"text": f"{name}：<i>多喝水。"}], "rewards": [0.5]}
            for one in asked
        ]
        write_rows(run / "evaluation" / f"scored_{name}.jsonl", rows)
    page = page_of(run)
    part = page[page.index('<section id="consultations">') :]
    part = part[: part.index("</section>")]
    assert part.count('<div class="answer">') == 9 and part.count("ppo：&lt;i&gt;多喝水。") == 3
    assert page.index('id="consultations"') < page.index('id="judge"')
    titles = ("A clear case", "Asking comes first", "Something must not be missed")
    assert [title in part for title in titles] == [True] * 3
    assert "names no disease; it is " in part and "should have asked first" in part


def test_stages_that_did_not_run_are_left_out(run):
    for name in ("evaluation.json", "labels.jsonl.report.json"):
        (run / name).unlink()
    (run / "reward" / "reward_report.json").unlink()
    page = page_of(run)
    for name in ("evaluation", "judge", "reward"):
        assert f'id="{name}"' not in page and f'href="#{name}"' not in page
    assert 'id="curves"' in page


def test_the_share_of_the_time_that_trained_has_a_table_with_its_losses(run):
    started = {"stage": "sft", "time": "1970-01-01T00:16:40+00:00"}
    again = started | {"time": "1970-01-01T00:18:00+00:00"}
    machine = {"devices": {"number": 1, "kind": "cpu"}, "python": "3.11", "platform": "Linux"}
    starts = [one | machine | {"git_commit": None, "packages": {}} for one in (started, again)]
    write(run / "environment.json", {"starts": starts})
    rows = [
        {"step": 1, "time_s": 1050.0, "throughput/trained_s": 30.0, "throughput/compile_s": 10.0},
        {"step": 2, "time_s": 1100.0, "throughput/trained_s": 20.0, "throughput/saving_s": 5.0},
    ]
    write_rows(run / "sft" / "metrics.jsonl", rows)
    page = page_of(run)
    head = page[page.index("since its first start") :]
    head = re.sub(r"<[^>]+>", "|", head[: head.index("</table>")])
    words = [word.strip() for word in head.split("|") if word.strip()]
    assert words == [
        "since its first start", "trained", "compiling", "saving", "starting and restarting",
        "sft", "1 min 40 s", "50.0", "%", "10.0", "%", "5.0", "%", "35.0", "%",
    ]  # fmt: skip


def test_every_cell_of_a_table_of_words_has_its_head_before_it_on_a_phone(run):
    page = page_of(run)
    tables = re.findall(r'<table[^>]*class="words"[^>]*>\s*<thead>.*?</thead>', page, re.DOTALL)
    assert max(table.count("<th>") for table in tables) > 2
    for table in tables:
        heads = re.findall("<th>(.*?)</th>", table)
        given = dict(re.findall("--head-(\\d+): '(.*?): ';", table))
        expected = {str(place): head for place, head in enumerate(heads, 1)}
        assert given == (expected if len(heads) > 2 else {})
    templates = pathlib.Path(page_module.__file__).parent.glob("templates/*.jinja")
    calls = [
        heads
        for template in templates
        for heads in re.findall(r"call table\((\[.*?\]).*?words=true", template.read_text("utf-8"))
    ]
    most = max(len(ast.literal_eval(heads)) for heads in calls)
    assert most > 4
    for place in range(2, most + 1):
        assert f"td:nth-child({place})::before {{ content: var(--head-{place}); }}" in page


def test_an_empty_folder_gives_a_page_that_says_little(tmp_path):
    page = page_of(tmp_path)
    assert "<h1>Trial &amp; error</h1>" in page and named_numbers(page) == {}


def test_what_was_left_out_stands_in_the_page_with_its_reasons(run):
    assert "left out because" not in page_of(run)
    account = Account("dialogues", rows=41, rows_used=40, rows_left_out=Counter({"bad row": 1}))
    account.use("to train on", 5)
    account.use("held out", 1)
    for line in range(34):
        account.leave_out("too long", f"mine<b>.jsonl:{line + 1}", "does not fit 64 tokens")
    write(run / "sft" / "data.json", account.to_json())
    page = page_of(run)
    assert "left out because" in page
    assert re.search(r"<th scope=row>sft</th><td>too long</td><td>(<[^>]+>)?34", page)
    assert "mine&lt;b&gt;.jsonl:1: does not fit 64 tokens" in page
    assert re.search(r"<td>bad row</td><td>(<[^>]+>)?1<", page)
