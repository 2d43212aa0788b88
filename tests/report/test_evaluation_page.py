"""The page of an evaluation: hostile text stays text, and nothing is loaded from anywhere."""

import re

from huatuo_jax.report.evaluation_page import render_page
from tests import browser

HOSTILE = "</td><script>document.title='broken'</script>$\\frac{{{ 7*7 }}"


def group(wins, losses):
    return {
        "wins": wins,
        "ties": 0,
        "losses": losses,
        "failed": 0,
        "share": None,
        "points": 2.0 * wins,
        "other_points": 2.0 * losses,
        "score_ratio": None,
    }


def result(name=HOSTILE):
    share = {"value": 0.5, "low": 0.4, "high": 0.6}
    figures = {
        "judge": name,
        "overall": group(3, 3) | {"share": share, "score_ratio": 1.0},
        "groups": {f"{name}{place}": group(place, 2) for place in range(4)} | {"空": group(0, 0)},
        "orders_disagree": 1,
        "position_bias": share,
        "longer_share": None,
        "length_bias": None,
        "length_balanced_share": share,
    }
    responses = {
        "num": 6,
        "num_missing": 1,
        "missing": {"q": "too long"},
        "num_empty": 0,
        "num_cut_at_limit": 0,
    }
    return {
        "models": {name: {"model": name}, "other": {"model": "x"}},
        "judge": {"judge": name},
        "second_judge": None,
        "settings": {"seed": 0, "files": {"kuake_qic": name}},
        "versions": {"python": "3"},
        "calls": {f"responses/{name}": {"requests": 6, "unknown_requests": 1}},
        "contamination": {
            "files": [name],
            "num_training_texts": 3,
            "num_unreadable_rows": 0,
            "suites": {
                "single_turn": {
                    "num": 6,
                    "num_unchecked": 1,
                    "num_short": 0,
                    "overlaps": [name],
                    "examples": {name: [{"source": name, "passage": name}]},
                }
            },
        },
        "suites": {
            "single_turn": {
                "num": 6,
                "models": {
                    each: {"responses": responses, "mean_characters": 30.0}
                    for each in (name, "other")
                },
                "comparisons": [
                    {"models": [name, "other"], "figures": figures, "second_judge": None}
                ],
            }
        },
    }


def test_hostile_text_is_shown_as_text_and_loads_nothing():
    page = render_page(result())
    assert "<script" not in page and "&lt;script&gt;" in page and "{{ 7*7 }}" in page
    assert not re.search(r"""(?:src|href)=["'](?!#)""", page)
    assert page.count("<polygon") == 2


def test_groups_without_a_verdict_and_missing_responses_are_named():
    assert "1 missing (1 too long) and taken as empty" in render_page(result("m"))
    assert "no verdict on 空" in render_page(result("m"))


def test_the_page_fits_a_phone_and_runs_nothing(tmp_path):
    path = tmp_path / "report.html"
    path.write_text(render_page(result()), "utf-8")
    with browser.chromium() as page:
        for width in (390, 1280):
            page.size(width, 900)
            page.open(path.as_uri())
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run("document.title") == "Evaluation"
        assert set(page.requests) == {path.as_uri()} and not page.errors
