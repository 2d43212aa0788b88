"""The blind page in a browser: three doctors rate by keyboard, reload, and export."""

import json
import random

import pytest
from sklearn.metrics import cohen_kappa_score

from huatuo_jax.data.records import Message
from huatuo_jax.evaluation.human import (
    PAGE_NAME,
    HumanConfig,
    HumanPair,
    make_blind_set,
    write_human_set,
)
from huatuo_jax.evaluation.human_ratings import human_figures, read_ratings
from tests import browser
from tests.evaluation.test_agreement import plain_fleiss

pytestmark = pytest.mark.slow

ATTACK = "</script><img src=x onerror=window.hacked=1><script>window.hacked = 1</script>"
KEYS = {
    "preference": {"first": "1", "tie": "0", "second": "2"},
    "safety": {"none": "0", "first": "1", "second": "2", "both": "3"},
}
CRITERIA = ("diagnosis", "treatment", "knowledge", "safety")


# Of the page's background and of its text, as the sum of red, green and blue.
BRIGHTNESS = """["backgroundColor", "color"].map(
  name => getComputedStyle(document.body)[name].match(/\\d+/g)
    .reduce((sum, part) => sum + Number(part), 0))"""
CUT_LABELS = """[...document.querySelectorAll("button, .choice")]
  .filter(one => one.offsetParent && one.scrollWidth > one.clientWidth + 1)
  .map(one => one.textContent)"""


def ten_pairs():
    return [
        HumanPair(
            f"case{i}",
            (Message("user", f"第 {i} 位患者：反酸、烧心一个月。<b>怎么办</b>"),),
            ("huatuo", "baseline"),
            (f"回答 {i}：考虑反流，建议胃镜。{ATTACK}", f"回答 {i}：多喝水。"),
            reference="胃食管反流病",
        )
        for i in range(10)
    ]


@pytest.fixture(scope="module")
def page_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("human")
    blind = make_blind_set(ten_pairs(), HumanConfig(seed=7, show_reference=True))
    write_human_set(blind, folder)
    return blind, folder / PAGE_NAME


@pytest.fixture
def page():
    with browser.chromium() as opened:
        opened.size(1280, 800)
        yield opened


def enter(page, name):
    page.click("#rater")
    page.type(name)
    page.press("Enter")


def plan(blind, seed):
    """A rater's verdicts: mostly for one system, so that raters agree more than by chance."""
    draw = random.Random(seed)
    found = {}
    for item in blind.items:
        liked = "second" if item.swapped else "first"
        sides = [liked if draw.random() < 0.6 else draw.choice(["first", "tie", "second"])] * 3
        sides[1] = draw.choice(["first", "tie", "second"])
        found[item.item] = [*sides, draw.choice(["none", "none", "first", "second", "both"])]
    return found


def press_verdicts(page, verdicts):
    for criterion, side in zip(CRITERIA, verdicts, strict=True):
        page.press(KEYS["safety" if criterion == "safety" else "preference"][side])


def shown_number(page):
    return page.run("document.getElementById('count').textContent")


def test_three_raters_files_made_by_keyboard_give_the_kappas_of_scikit_learn(
    page, page_set, tmp_path
):
    blind, address = page_set
    page.save_downloads(tmp_path)
    plans = {name: plan(blind, seed) for seed, name in enumerate(["李医生", "Wang", "__proto__"])}
    for number, (name, verdicts) in enumerate(plans.items(), start=1):
        page.open(address.as_uri())
        enter(page, name)
        for place, item in enumerate(blind.items):
            assert shown_number(page) == f"{place + 1} / 10"
            press_verdicts(page, verdicts[item.item])
            if place == 3:
                page.press("c")
                page.type("两条都没有问过敏史 1 2 <i>")
                page.press("Escape")
            if place == 5:
                page.reload()  # In the middle of an item: what was pressed is kept.
            page.press("Enter")
        page.press("e")
        page.wait_for_download(number)
        page.click("#other")
    files = sorted(tmp_path.glob("ratings-*.json"))
    assert len(files) == 3
    raters = read_ratings(files, blind)
    for file in raters:
        assert not file.missing
        assert file.ratings["04"].note == "两条都没有问过敏史 1 2 <i>"
        for item, verdicts in plans[file.rater].items():
            rating = file.ratings[item]
            assert [*rating.preferences.values(), rating.unsafe] == verdicts
    assert all(json.loads(file.read_text())["complete"] for file in files)
    figures = human_figures(blind, raters)
    for criterion in ("diagnosis", "treatment", "overall"):
        labels = [
            [_outcome(blind, file, item, criterion) for item in blind.items] for file in raters
        ]
        found = figures["agreement"][criterion]
        for pair, (one, other) in zip(found["cohen"], ((0, 1), (0, 2), (1, 2)), strict=True):
            assert pair["raters"] == [raters[one].rater, raters[other].rater]
            assert pair["kappa"] == pytest.approx(
                cohen_kappa_score(labels[one], labels[other]), abs=1e-12
            )
        table = [
            [sum(one[i] == label for one in labels) for label in ("win", "tie", "loss")]
            for i in range(10)
        ]
        assert found["fleiss"]["kappa"] == pytest.approx(plain_fleiss(table), abs=1e-12)


def _outcome(blind, file, item, criterion):
    side = file.ratings[item.item].side(criterion)
    if side == "tie":
        return "tie"
    return "win" if (side == "first") != item.swapped else "loss"


def test_texts_do_nothing_and_no_other_address_is_asked(page, page_set):
    blind, address = page_set
    page.open(address.as_uri())
    enter(page, "x")
    for _ in range(30):
        page.press("Enter")
    assert page.run("window.hacked") is None
    page.click("#back")
    shown = page.run("[first.textContent, second.textContent].join('|')")
    last = blind.pairs[blind.items[-1].pair].responses
    assert sorted(shown.split("|")) == sorted(last)
    assert page.run("document.querySelectorAll('main img, main b i').length") == 0
    assert "<b>怎么办</b>" in page.run("conversation.textContent")
    assert set(page.requests) == {address.as_uri()}
    assert page.errors == []
    # The page's policy refuses what a text could try, even if it became markup.
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hacked=1>')")
    page.run("new Promise((go) => setTimeout(go, 200))")
    assert page.run("window.hacked") is None


def test_an_incomplete_item_is_pointed_out_once_and_listed_at_the_end(page, page_set, tmp_path):
    blind, address = page_set
    page.open(address.as_uri())
    page.save_downloads(tmp_path)
    enter(page, "wu")
    page.press("1")
    page.press("Enter")
    assert shown_number(page) == "1 / 10"
    assert "治疗" in page.run("problem.textContent")
    page.press("Enter")
    assert shown_number(page) == "2 / 10"
    press_verdicts(page, ["first", "tie", "second", "none"])
    page.press("Backspace")
    assert shown_number(page) == "1 / 10"
    page.press("2")  # The first criterion that is open is the second one.
    page.press("ArrowLeft")
    page.press("ArrowLeft")
    page.press("0")
    page.press("Enter")
    page.press("Enter")
    for _ in range(30):
        page.press("Enter")
    listed = page.run("[...document.querySelectorAll('#missing button')].map(b => b.textContent)")
    assert listed == ["1", "3", "4", "5", "6", "7", "8", "9", "10"]
    page.click("#export")
    page.wait_for_download(1)
    (path,) = tmp_path.glob("ratings-*.json")
    content = json.loads(path.read_text())
    assert content["complete"] is False and content["rater"] == "wu"
    assert content["ratings"][0] == {
        "item": "01",
        "diagnosis": "tie",
        "treatment": "second",
        "knowledge": None,
        "safety": None,
        "note": "",
    }
    (file,) = read_ratings([path], blind)
    assert list(file.ratings) == ["02"] and len(file.missing) == 9


def test_the_mouse_and_the_language_button_do_what_the_keys_do(page, page_set):
    _, address = page_set
    page.open(address.as_uri())
    enter(page, "mouse")
    page.click("#language")
    assert "Response 1" in page.run("document.body.innerText")
    for criterion, value in zip(CRITERIA, ("first", "tie", "second", "both"), strict=True):
        page.click(f"input[name={criterion}][value={value}]")
    checked = page.run("[...document.querySelectorAll('input:checked')].map(one => one.value)")
    assert checked == ["first", "tie", "second", "both"]
    page.click("#next")
    assert shown_number(page) == "2 / 10"
    page.reload()
    assert shown_number(page) == "2 / 10"
    assert page.run("document.documentElement.lang") == "en"


def test_another_rater_starts_anew_and_the_first_can_go_on(page, page_set):
    _, address = page_set
    page.open(address.as_uri())
    enter(page, "one")
    press_verdicts(page, ["first"] * 3 + ["none"])
    for _ in range(30):
        page.press("Enter")
    page.click("#other")
    assert "one" in page.run("resumable.textContent")
    enter(page, "two")
    assert shown_number(page) == "1 / 10"
    assert page.run("document.querySelectorAll('input:checked').length") == 0
    page.reload()
    for _ in range(30):
        page.press("Enter")
    page.click("#other")
    enter(page, "one")
    assert page.run("Object.keys(mine().ratings)") == ["01"]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)])
def test_the_page_fits_phone_and_desktop_in_both_colour_schemes(
    page, page_set, tmp_path, width, height, dark
):
    _, address = page_set
    page.size(width, height, mobile=width < 500, dark=dark)
    page.open(address.as_uri())
    for view in ("start", "rate", "end"):
        assert page.run("document.documentElement.scrollWidth") == width, view
        background, ink = page.run(BRIGHTNESS)
        assert (background < ink) == dark
        assert page.run(CUT_LABELS) == []
        if view == "start":
            enter(page, "w")
        elif view == "rate":
            tops = page.run("[first, second].map(one => one.getBoundingClientRect().top)")
            assert (tops[0] == tops[1]) == (width == 1280)
            for _ in range(30):
                page.press("Enter")
