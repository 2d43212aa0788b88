"""Each section of a report by itself: its figures, its dash for an absent one, text as text."""

import math
import re

import pytest

from huatuo_jax.clinic.dialogues import prompts
from huatuo_jax.report import sections
from huatuo_jax.report.page import environment, make_page, render
from huatuo_jax.report.run import MODELS, Run, read_run
from tests.report.test_page import entry, evaluation, labels_report, released
from tests.report.test_page import reward_report as reward

HOSTILE = "<script>alert('&\"')</script>"
ESCAPED = "&lt;script&gt;alert(&#39;&amp;&#34;&#39;)&lt;/script&gt;"


@pytest.fixture
def empty(tmp_path):
    """A run of which nothing is known."""
    return read_run(tmp_path / "run")


def with_fields(run, **fields):
    return Run(**{name: getattr(run, name) for name in Run.__dataclass_fields__} | fields)


def plain(html):
    """The text of a piece of HTML without its tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", str(html)).split())


def cells(html, name):
    """The cells of the row of that name, as text."""
    (row,) = (one for one in re.findall(r"<tr>(.*?)</tr>", html) if f">{name}</th>" in one)
    return [plain(cell) for cell in re.findall(r"<td>(.*?)</td>", row)]


def test_a_run_of_nothing_has_the_sections_of_data_and_costs_alone(empty):
    shown = {
        name: getattr(sections, name)(empty)
        for name in ("consultations", "release", "curves", "judge", "reward_model", "ppo")
    }
    assert set(shown.values()) == {None}
    assert sections.evaluation(empty) is None and sections.answers(empty, 3) is None
    page = make_page(empty, title="t", num_prompts=3)
    assert re.findall(r'<section id="(\w+)">', page) == ["data", "costs"]
    assert re.findall(r'<a href="#(\w+)">', page) == ["data", "costs"]


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (None, 3, "–"),
        (math.nan, 3, "–"),
        (math.inf, 3, "–"),
        (0.12345, 3, "0.123"),
        (-0.5, 2, "\u22120.50"),
        (12, 3, "12"),
        (1234567, 3, "1,234,567"),
        (5000.0, 3, "5,000"),
        (999.0, 1, "999.0"),
    ],
)
def test_a_number_is_rounded_in_its_text_and_whole_in_its_attribute(value, digits, shown):
    macros = environment().get_template("macros.jinja").module
    html = str(macros.number(value, "it's", digits))
    whole = value is not None and math.isfinite(value)
    attributes = f'value="{value!r}" data-name="it&#39;s"'
    assert html == (f"<data {attributes}>{shown}</data>" if whole else shown)


@pytest.mark.parametrize(
    ("time_s", "shown"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (61.5, "1 min 2 s"),
        (3600, "1 h 0 min"),
        (7384, "2 h 3 min"),
    ],
)
def test_durations_are_in_seconds_minutes_or_hours(empty, time_s, shown):
    run = with_fields(empty, journal={"sft": entry(time_s)})
    assert cells(render("costs", **sections.costs(run)), "sft")[0] == shown


def test_the_headline_shows_a_dash_for_each_absent_figure(empty):
    found = evaluation()
    found["differences"]["ppo_over_sft"]["reward"] = None
    found["win_rates"]["ppo_over_sft"] = found["win_rates"]["ppo_over_sft"] | {"share": None}
    found["kl"] = {"per_sequence": None, "per_token": None}
    found["held_out_loss"] = None
    html = render("headline", **sections.headline(with_fields(empty, evaluation=found)))
    big = re.findall(r"<h3>([^<]*)</h3><p class=\"big\">(.*?)</p>", html)
    shown = {title: plain(value) for title, value in big}
    assert shown == {
        "Judge prefers PPO to SFT": "–",
        "Reward, PPO over SFT": "–",
        "KL from SFT": "–",
        "Time": "0 s",
    }
    assert "score higher" not in html and "Asked anew" not in html


def test_the_headline_of_the_judges_cost_names_the_currency_of_the_prices(empty):
    labels = labels_report()
    labels["judges"][0]["cost"]["money"] = 1.5
    run = with_fields(empty, labels=labels)
    assert "judge's cost 1.50" in plain(render("headline", **sections.headline(run)))
    run = with_fields(empty, labels=labels | {"prices": {"currency": HOSTILE}})
    assert f"1.50</data> {ESCAPED}" in render("headline", **sections.headline(run))


def test_data_counts_dialogues_by_kind_and_split(empty):
    def by_kind(**kinds):
        return {
            "by_kind": {
                name: {"examples": count, "trained_tokens": 10 * count}
                for name, count in kinds.items()
            }
        }

    splits = {"train": by_kind(real=3, **{HOSTILE: 2}), "held_out": by_kind(real=1)}
    run = with_fields(empty, dialogues={"splits": splits})
    html = render("data", **sections.data(run))
    assert cells(html, "real") == ["3", "30", "1", "10"]
    assert cells(html, ESCAPED) == ["2", "20", "0", "0"]
    assert "<th>held out: tokens</th>" in html


def test_data_names_the_inputs_and_figures_of_finished_stages(empty):
    journal = {
        "sft": entry(1.0, step=3, **{"eval/loss": 0.5}),
        "ppo": entry(1.0) | {"inputs": {HOSTILE: "abc", "model": "def"}},
        "export": entry(1.0) | {"result": None},
    }
    html = render("data", **sections.data(with_fields(empty, journal=journal)))
    assert cells(html, "sft") == ["model", "steps 3 ; held-out loss 0.500"]
    assert cells(html, "ppo")[1] == "done" and f"<td>{ESCAPED}, model</td>" in html
    assert ">export</th>" not in html


def test_the_judges_section_says_which_judge_it_was(empty):
    def section(judge):
        labels = labels_report()
        labels["judges"][0] |= {"judge": judge}
        return render("judge", **sections.judge(with_fields(empty, labels=labels)))

    rubric, clinic, own = section("offline-rubric-v1"), section("clinic-truth-v1"), section(HOSTILE)
    assert "What the offline judge is." in rubric and "What the clinic" not in rubric
    assert "What the clinic's judge is." in clinic and "offline judge is" not in clinic
    assert 'class="note"' not in own and f"{ESCAPED} (score)" in own
    assert cells(own, f"{ESCAPED} (score)")[4:] == [
        "not asked in pairs",
        "not asked in pairs",
    ]


def test_a_standard_error_stands_behind_its_figure_where_it_is_known(empty):
    labels = labels_report()
    labels["judges"][0]["ties"] = {"value": 0.25, "standard_error": 0.125, "num_items": 8}
    html = render("judge", **sections.judge(with_fields(empty, labels=labels)))
    shown = cells(html, r"offline-rubric-v1 (score)")
    assert shown[1:3] == ["0.000", "0.250 ± 0.125"]


def test_the_reward_model_stands_beside_length_alone(empty):
    html = render("reward", **sections.reward_model(with_fields(empty, reward=reward())))
    assert cells(html, "reward model") == ["0.781 [ 0.700 , 0.850 ]", "0.400", "0.062"]
    assert cells(html, "length alone")[0].startswith("0.516")
    assert "– among answers to one prompt" in plain(html)
    assert cells(html, "0.100 to 0.500") == ["0.781 [ 0.700 , 0.850 ]"]
    assert 'aria-label="reliability"' in html and "what differs" not in html


def test_a_margin_without_pairs_has_a_dash(empty):
    report = reward() | {"accuracy_by_margin": [{"margin_low": 0.0, "margin_high": 1.0}]}
    html = render("reward", **sections.reward_model(with_fields(empty, reward=report)))
    assert cells(html, "0.000 to 1.000") == ["–"]


def test_release_escapes_its_reason_and_its_warnings(empty):
    decided = released(warnings=[HOSTILE]) | {"reason": HOSTILE, "judge": HOSTILE}
    found = evaluation() | {"release": decided}
    html = render("release", **sections.release(with_fields(empty, evaluation=found)))
    assert f"<strong>{ESCAPED}</strong> {ESCAPED}</p>" in html and HOSTILE not in html
    assert f"Judged by {ESCAPED}, in both orders" in html
    assert cells(html, "best-of-n over SFT") == ["–", "best-of-n", "0", "8"]


def test_the_evaluation_has_a_dash_for_what_a_model_lacks(empty):
    found = evaluation()
    found["models"]["ppo"] = dict(found["models"]["ppo"]) | {"reward": None}
    del found["models"]["ppo"]["stopped"]
    found["held_out_loss"] = {"sft": {"eval/loss": 4.5}}
    html = render("evaluation", **sections.evaluation(with_fields(empty, evaluation=found)))
    assert cells(html, "came to an end")[1:] == ["0.875 [ 0.625 , 1.125 ]", "–"]
    assert cells(html, sections.MEASURES[0][1])[2] == "–"
    assert cells(html, r"held-out loss (nats a token)") == ["–", "4.500", "–"]


def test_another_temperature_of_the_rollouts_is_told(empty):
    found = evaluation()
    for rollouts, told in ((None, False), (1.0, False), (0.7, True)):
        found["sampling"]["rollout_temperature"] = rollouts
        html = render("evaluation", **sections.evaluation(with_fields(empty, evaluation=found)))
        assert ("PPO sampled at temperature 0.7: rewards" in html) == told


def records(count, text="多喝水。"):
    return [
        {
            "id": f"p{index}",
            "messages": [
                {"role": "system", "content": "不出现"},
                {"role": "user", "content": f"问{index}{HOSTILE}"},
            ],
            "answers": [{"text": text, "finish_reason": "stop"}],
            "rewards": [None],
        }
        for index in range(count)
    ]


def test_answers_are_chosen_evenly_and_an_empty_one_is_named(empty):
    rows = dict.fromkeys(MODELS, []) | {"sft": records(9, HOSTILE), "ppo": records(9, " ")}
    html = render("answers", **sections.answers(with_fields(empty, answers=rows), 3))
    assert re.findall(r"问(\d)", html) == ["0", "3", "6"]
    assert html.count("<em>(an empty answer)</em>") == 3 and "不出现" not in html
    assert html.count(f"<div>{ESCAPED}</div>") == 3 and HOSTILE not in html
    assert html.count("<p>reward –</p>") == 6
    assert len(sections.answers(with_fields(empty, answers=rows), 99)["prompts"]) == 9


def test_a_responses_line_breaks_are_kept_and_no_others_added(empty):
    rows = dict.fromkeys(MODELS, []) | {"ppo": records(1, "一。\n二。")}
    html = render("answers", **sections.answers(with_fields(empty, answers=rows), 1))
    assert "<div>一。\n二。</div>" in html


def test_consultations_show_remarks_on_each_models_answer(empty):
    asked = list(prompts(30, seed=0, held_out=True))
    rows = [one.to_json() | {"answers": [{"text": HOSTILE}], "rewards": [0.5]} for one in asked]
    run = with_fields(empty, answers=dict.fromkeys(MODELS, []) | {"sft": rows, "ppo": rows})
    html = render("consultations", **sections.consultations(run))
    assert html.count("<h4>SFT</h4>") == html.count("<h4>PPO</h4>") == 3
    assert html.count(ESCAPED) == 6 and HOSTILE not in html
    assert '<li class="bad">names no disease; it is ' in html


def test_costs_list_settings_by_path_and_the_environment(empty):
    machine = {
        "devices": {"number": 2, "kind": HOSTILE},
        "python": "3.11",
        "platform": "Linux",
        "git_commit": None,
        "packages": {"jax": "0.10"},
    }
    stage = entry(1.0) | {"settings": {"a": {"b": HOSTILE}, "c": None}, "finished": None}
    run = with_fields(empty, journal={"sft": stage}, environment=machine)
    html = render("costs", **sections.costs(run))
    assert f"<code>a.b</code></th><td><code>{ESCAPED}</code></td>" in html
    assert cells(html, "<code>c</code>") == ["None"] and cells(html, "sft")[2] == "not finished"
    assert f"<td>2 × {ESCAPED}</td>" in html and cells(html, "commit") == ["not in git"]


def test_plots_are_the_only_markup_that_a_section_puts_in_as_it_is(empty):
    rows = [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3)]
    metrics = {"sft": rows, "reward": [], "ppo": []}
    html = render("curves", **sections.curves(with_fields(empty, metrics=metrics)))
    assert html.count("<svg") == html.count("<figure>") == 1
    assert "<figcaption>Fine-tuning: cross-entropy of the doctor&#39;s tokens.</figcaption>" in html


def test_ppo_without_judgings_plots_the_score_against_kl(empty):
    rows = [
        {"step": step, "ppo/score": step, "ppo/kl_per_sequence": step, "ppo/response_length": 3.0}
        for step in (1, 2)
    ]
    metrics = {"sft": [], "reward": [], "ppo": rows}
    html = render("ppo", **sections.ppo(with_fields(empty, metrics=metrics)))
    assert 'aria-label="score-kl"' in html and 'aria-label="judged"' not in html
    assert "was kept" not in html
