"""The report of a run: its figures are those of its rows, and it shows nobody's data."""

import math
from collections import Counter

import yaml

from huatuo_jax.data.records import Message
from huatuo_jax.judge.spending import Price, Totals, Usage
from huatuo_jax.synthesis.jobs import Candidate, Rejection
from huatuo_jax.synthesis.report import (
    RunFacts,
    dataset_card,
    distinct,
    diversity,
    render_page,
    report_figures,
)
from huatuo_jax.synthesis.runner import Outcome


def candidate(prompt, answer, department):
    return Candidate(
        messages=(Message("user", prompt), Message("assistant", answer)),
        prompt=prompt,
        labels={"department": department, "language": "zh"},
    )


KEPT = [
    candidate("头痛三天怎么办？", "注意休息。", "神经内科"),
    candidate("头痛四天怎么办？", "多喝水。", "神经内科"),
    candidate("皮肤起红斑很痒。", "先抹药膏。", "皮肤科"),
]
OUTCOME = Outcome(
    rows=[{}] * 3,
    kept=KEPT,
    rejected={
        "one": Rejection(reason="refusal", detail="抱歉", sample="我叫李明，电话13812345678。"),
        "two": Rejection(reason="refusal", detail="抱歉", sample="<script>alert(1)</script>"),
        "three": Rejection(reason="echo", sample="又说一遍"),
    },
    requests=Counter({("patient", 1): 1_004, ("doctor", 1): 3, ("doctor", 2): 1}),
    batches=1,
)
FACTS = RunFacts(
    kind="distilled_instruction",
    teacher="made-up",
    settings={"num_rows": 3},
    totals=Totals(
        requests=9,
        unknown_requests=1,
        usage=Usage(input_tokens=600, output_tokens=300),
        cost=0.6,
        unknown_cost=0.1,
    ),
    price=Price(input=1e-3, cached_input=1e-3, output=1e-3, currency="EUR", table="mine.json"),
    num_known_prompts=5,
    num_tests=7,
)


def test_figures_are_those_of_the_rows_and_the_money_that_of_the_spending_file():
    figures = report_figures(OUTCOME, FACTS)
    assert (figures["rows"], figures["candidates"], figures["yield"]) == (3, 6, 0.5)
    assert figures["labels"]["department"] == {"神经内科": 2, "皮肤科": 1}
    assert {name: one["count"] for name, one in figures["rejections"].items()} == {
        "refusal": 2,
        "echo": 1,
    }
    cost = figures["cost"]
    assert (cost["requests"], cost["money"], cost["unknown_money_at_most"]) == (9, 0.6, 0.1)
    assert math.isclose(cost["money_per_row"], 0.2) and cost["tokens_per_row"] == 300
    assert figures["lengths"]["messages of a row"]["mean"] == 2


def test_distinct_n_is_the_share_of_different_n_grams():
    assert distinct(["aab", "ab"], 1) == 2 / 5
    assert distinct(["aab", "ab"], 2) == 2 / 3
    assert distinct(["a"], 2) is None


def test_the_nearest_neighbour_of_a_prompt_is_another_prompt():
    near = diversity(KEPT)["nearest neighbour, ROUGE-L"]
    assert near["sampled"] == 3 and 0.58 < near["mean"] < 0.7


def test_the_page_and_the_card_show_nobodys_data_and_no_markup():
    figures = report_figures(OUTCOME, FACTS)
    page, card = render_page(figures), dataset_card(figures, "rows.jsonl")
    for text in (page, card):
        assert "李明" not in text and "13812345678" not in text
    assert page.count('<table aria-label="Samples: refusal" class="words">') == 1
    assert "[姓名]" in page and "<script>" not in page and "&lt;script&gt;" in page
    assert "http://" not in page and "https://" not in page
    head = yaml.safe_load(card.split("---")[1])
    assert head["language"] == ["zh"] and head["configs"][0]["data_files"] == "rows.jsonl"
    assert "| refusal | 2 |" in card


def test_the_page_shows_requests_by_attempt_beside_one_another():
    page = render_page(report_figures(OUTCOME, FACTS))
    columns = '<th scope="col">attempt</th><th scope="col">doctor</th><th scope="col">patient</th>'
    assert columns in page
    assert '<th scope="row">1</th><td>3</td><td>1,004</td>' in page
    assert '<th scope="row">2</th><td>1</td><td>0</td>' in page


def test_a_run_without_rows_has_a_report_too():
    figures = report_figures(Outcome(ended="the source has no more rows"), FACTS)
    assert figures["yield"] is None and figures["cost"]["money_per_row"] is None
    assert "the source has no more rows" in render_page(figures)
    assert dataset_card(figures, "rows.jsonl")
