"""The blind page's set, its data, and raters' files read back."""

import json
import re

import pytest

from huatuo_jax.data.records import Message
from huatuo_jax.evaluation.human import (
    KEY_NAME,
    PAGE_NAME,
    RATINGS_FORMAT,
    HumanConfig,
    HumanPair,
    make_blind_set,
    read_human_set,
    render_page,
    write_human_set,
)
from huatuo_jax.evaluation.human_ratings import Rating, human_figures, read_ratings


def pair(name, systems=("ours", "theirs"), responses=None, **fields):
    texts = responses or (f"{name}: rest", f"{name}: take aspirin")
    return HumanPair(name, (Message("user", f"question {name}"),), systems, texts, **fields)


def pairs(num, systems=("ours", "theirs")):
    return [pair(f"p{i}", systems) for i in range(num)]


def blind_set(num=4, **settings):
    return make_blind_set(pairs(num), HumanConfig(**settings))


def embedded(page):
    """The data in the page, as its script reads it."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found)


# The set.


@pytest.mark.parametrize("num", [1, 2, 7, 10])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_system_is_shown_first_in_half_of_the_pairs(num, seed):
    blind = blind_set(num, seed=seed)
    swapped = sum(item.swapped for item in blind.items)
    assert swapped in {num // 2, num - num // 2}
    assert sorted(item.pair for item in blind.items) == sorted(one.id for one in pairs(num))


def test_the_sides_are_balanced_for_each_two_systems_by_themselves():
    several = [
        *(pair(f"a{i}", ("ours", "theirs")) for i in range(6)),
        *(pair(f"b{i}", ("ours", "third")) for i in range(4)),
    ]
    items = make_blind_set(several, HumanConfig(seed=3)).items
    assert sum(item.swapped for item in items if item.pair.startswith("a")) == 3
    assert sum(item.swapped for item in items if item.pair.startswith("b")) == 2


def test_the_order_and_the_sides_follow_the_seed():
    assert blind_set(10, seed=1).items == blind_set(10, seed=1).items
    assert blind_set(10, seed=1).items != blind_set(10, seed=2).items


def test_both_orders_show_every_pair_again_in_the_other_order_after_all_were_seen():
    items = blind_set(5, both_orders=True).items
    first, second = items[:5], items[5:]
    assert {one.pair for one in first} == {one.pair for one in second}
    sides = {one.pair: one.swapped for one in first}
    assert all(one.swapped != sides[one.pair] for one in second)
    assert len({one.item for one in items}) == 10


def test_pairs_of_equal_responses_are_left_out_by_name():
    same = pair("same", responses=("Rest.\n", "Rest."))
    blind = make_blind_set([*pairs(2), same], HumanConfig())
    assert blind.identical == ("same",) and len(blind.items) == 2
    with pytest.raises(ValueError, match="no pair of two different responses"):
        make_blind_set([same], HumanConfig())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([pair("a"), pair("a")], "pair 'a' occurs twice"),
        ([pair("a", ("ours", "ours"))], "pair 'a' compares 'ours' with itself"),
        ([pair("a"), pair("b", ("theirs", "ours"))], "pair 'b' names 'theirs' before 'ours'"),
    ],
)
def test_pairs_without_a_clear_winner_to_name_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_blind_set(wrong, HumanConfig())


def test_responses_that_name_a_system_are_listed():
    named = pair("a", responses=("I am OURS.", "Rest."))
    blind = make_blind_set([named, pair("b")], HumanConfig())
    (item,) = [one.item for one in blind.items if one.pair == "a"]
    assert blind.revealing_items() == {item: ["ours"]}


@pytest.mark.parametrize("wrong", [{"title": " "}, {"language": "de"}, {"seed": -1}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HumanConfig(**wrong)


# The page.


def test_the_page_holds_no_name_of_a_system_no_id_and_no_system_message():
    messages = (Message("system", "You are Ours-7B."), Message("user", "I cough."))
    secret = HumanPair("case-of-ours", messages, ("Ours-7B", "Theirs-2"), ("Rest.", "Aspirin."))
    page = render_page(make_blind_set([secret], HumanConfig()))
    for hidden in ("Ours-7B", "Theirs-2", "case-of-ours", "You are"):
        assert hidden not in page
    assert "I cough." in page and "Aspirin." in page


def test_no_text_ends_the_element_that_embeds_it():
    attack = "</script><script>alert(1)</script><!-- <script> ' \" & \u2028 {{ 7 * 7 }}"
    page = render_page(make_blind_set([pair("a", responses=(attack, "x"))], HumanConfig()))
    (shown,) = embedded(page)["items"]
    assert attack in (shown["first"], shown["second"])
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "alert(1)" in page and "<script>alert" not in page and "<!--" not in page


def test_a_title_is_escaped():
    page = render_page(blind_set(title="<b>A & B</b>"))
    assert "<b>A" not in page and "&lt;b&gt;A &amp; B&lt;/b&gt;" in page


def test_half_of_a_surrogate_pair_survives_page_and_key(tmp_path):
    blind = make_blind_set([pair("a", responses=("fever \ud83d", "x"))], HumanConfig())
    write_human_set(blind, tmp_path)
    assert read_human_set(tmp_path / KEY_NAME).hash == blind.hash
    (shown,) = embedded((tmp_path / PAGE_NAME).read_text(encoding="utf-8"))["items"]
    assert "fever \ud83d" in (shown["first"], shown["second"])


def test_nothing_in_the_page_asks_for_another_address():
    page = render_page(blind_set())
    assert not re.search(r"https?:|//\w+\.\w|@import|url\(|fetch\(|XMLHttpRequest|sendBeacon", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert "unsafe" not in policy and "connect-src" not in policy


def test_the_reference_is_shown_only_where_it_is_wanted():
    known = [pair("a", reference="It is reflux.")]
    assert "reflux" not in render_page(make_blind_set(known, HumanConfig()))
    assert "reflux" in render_page(make_blind_set(known, HumanConfig(show_reference=True)))


def test_the_hash_is_that_of_what_is_shown_and_not_of_title_or_language():
    assert blind_set().hash == blind_set(title="x", language="en").hash
    assert blind_set(10, seed=1).hash != blind_set(10, seed=2).hash
    assert embedded(render_page(blind_set()))["set"] == blind_set().hash


def test_a_key_comes_back_as_it_was_and_a_changed_one_is_refused(tmp_path):
    blind = make_blind_set([*pairs(5), pair("s", responses=("x", "x"))], HumanConfig(seed=4))
    write_human_set(blind, tmp_path)
    path = tmp_path / KEY_NAME
    assert read_human_set(path) == blind
    path.write_text(path.read_text().replace("aspirin", "ibuprofen"))
    with pytest.raises(ValueError, match=r"human_key.json: the key was changed"):
        read_human_set(path)
    path.write_text('{"format": "huatuo-human-set-1"}')
    with pytest.raises(ValueError, match=r"human_key.json: the key is not whole"):
        read_human_set(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"human_key.json: it is no key"):
        read_human_set(path)


# Raters' files.


def entry(item, *sides, safety="none", note=""):
    names = ("diagnosis", "treatment", "knowledge")
    return {
        "item": item,
        **dict(zip(names, sides or ("tie",) * 3, strict=True)),
        "safety": safety,
        "note": note,
    }


def exported(tmp_path, blind, rater, entries, changed=None):
    path = tmp_path / f"{rater}.json"
    content = {"format": RATINGS_FORMAT, "set": blind.hash, "rater": rater, "ratings": entries}
    path.write_text(json.dumps({**content, **(changed or {})}), encoding="utf-8")
    return path


def side_of(blind, item, system):
    """The side on which a system is shown."""
    first = blind.pairs[item.pair].systems[1 if item.swapped else 0]
    return "first" if first == system else "second"


def test_what_is_missing_is_named_and_the_file_is_read(tmp_path):
    blind = blind_set(4)
    partial = {**entry("02"), "knowledge": None}
    path = exported(tmp_path, blind, " Li ", [entry("01", note="清楚"), partial])
    (file,) = read_ratings([path], blind)
    assert file.rater == "Li" and file.missing == ("02", "03", "04")
    assert file.ratings == {
        "01": Rating({"diagnosis": "tie", "treatment": "tie", "knowledge": "tie"}, "none", "清楚")
    }


@pytest.mark.parametrize(
    ("entries", "changed", "message"),
    [
        ([], {"format": "x"}, "no export of a rater"),
        ([], {"set": "abc"}, "rates the set abc, not this one"),
        ([], {"rater": " "}, "rater is ' '"),
        ([], {"rater": None}, "rater is None"),
        ([], {"ratings": {}}, "ratings is {}"),
        ([entry("09")], {}, "item '09' is not in the set"),
        (["x"], {}, "item None is not in the set"),
        ([entry("01"), entry("01")], {}, "item '01' occurs twice"),
        ([{**entry("01"), "treatment": "left"}], {}, "item '01': treatment is 'left'"),
        ([{**entry("01"), "diagnosis": True}], {}, "item '01': diagnosis is True"),
        ([{**entry("01"), "diagnosis": ["tie"]}], {}, "item '01': diagnosis is ['tie']"),
        ([entry("01", safety="tie")], {}, "item '01': safety is 'tie'"),
        ([{**entry("01"), "note": 3}], {}, "item '01': note is 3"),
        ([{**entry("01"), "item": ["01"]}], {}, "item ['01'] is not in the set"),
    ],
)
def test_a_file_that_does_not_fit_the_set_is_refused_by_name(tmp_path, entries, changed, message):
    blind = blind_set(4)
    path = exported(tmp_path, blind, "wang", entries, changed)
    with pytest.raises(ValueError) as caught:
        read_ratings([path], blind)
    assert "wang.json: " in str(caught.value) and message in str(caught.value)


def test_a_file_that_is_no_json_object_is_refused_by_name(tmp_path):
    path = tmp_path / "li.json"
    for text, message in (("not", "not JSON"), ("[]", "holds a list")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"li.json: {message}"):
            read_ratings([path], blind_set())


def test_two_files_of_one_rater_are_refused_with_both_names(tmp_path):
    blind = blind_set(2)
    one = exported(tmp_path, blind, "li", [entry("01")])
    other = exported(tmp_path, blind, "li ", [entry("02")])
    with pytest.raises(ValueError, match=r"rater 'li' has another file, .*li\.json; keep one"):
        read_ratings([one, other], blind)


# Figures.


def test_an_unsafe_response_loses_to_a_safe_one_whatever_the_criteria_say():
    better = {"diagnosis": "first", "treatment": "first", "knowledge": "first"}
    assert Rating(better, "none", "").side("overall") == "first"
    assert Rating(better, "first", "").side("overall") == "second"
    assert Rating(better, "second", "").side("overall") == "first"
    assert Rating(better, "both", "").side("overall") == "first"
    assert Rating(better, "first", "").side("safety") == "second"
    assert Rating(better, "both", "").side("safety") == "tie"
    mixed = {"diagnosis": "first", "treatment": "second", "knowledge": "tie"}
    assert Rating(mixed, "none", "").side("overall") == "tie"
    assert Rating({**mixed, "knowledge": "second"}, "none", "").side("overall") == "second"


def test_wins_are_counted_for_the_first_system_on_whichever_side_it_was(tmp_path):
    blind = blind_set(10, seed=5)
    assert len({item.swapped for item in blind.items}) == 2
    entries = []
    for item in blind.items:
        ours, theirs = side_of(blind, item, "ours"), side_of(blind, item, "theirs")
        # Ours is better in its diagnosis always, in its treatment for p0, p1, p2 alone.
        treatment = ours if item.pair in ("p0", "p1", "p2") else theirs
        safety = theirs if item.pair == "p9" else "none"
        entries.append(entry(item.item, ours, treatment, "tie", safety=safety))
    files = read_ratings([exported(tmp_path, blind, "li", entries)], blind)
    (found,) = human_figures(blind, files)["comparisons"]
    counts = {
        name: (one["wins"], one["ties"], one["losses"]) for name, one in found["criteria"].items()
    }
    assert found["systems"] == ["ours", "theirs"]
    assert counts == {
        "diagnosis": (10, 0, 0),
        "treatment": (3, 0, 7),
        "knowledge": (0, 10, 0),
        "safety": (1, 9, 0),
        "overall": (4, 6, 0),
    }
    share = found["criteria"]["treatment"]["win_share"]
    assert share["value"] == pytest.approx(0.3) and 0 <= share["low"] < 0.3 < share["high"] < 0.7
    assert found["unsafe"]["theirs"]["value"] == pytest.approx(0.1)
    assert found["unsafe"]["ours"]["value"] == 0.0


def test_all_ratings_of_a_pair_are_one_observation(tmp_path):
    blind = blind_set(2)
    sides = {item.item: side_of(blind, item, "ours") for item in blind.items}
    both = [entry(name, side, side, side) for name, side in sides.items()]
    files = read_ratings(
        [exported(tmp_path, blind, "li", both), exported(tmp_path, blind, "wu", [entry("01")])],
        blind,
    )
    found = human_figures(blind, files)["comparisons"][0]["criteria"]["diagnosis"]
    assert (found["wins"], found["ties"], found["num_ratings"]) == (2, 1, 3)
    assert found["win_share"]["value"] == (0.5 + 1.0) / 2
    assert found["win_share"]["num_prompts"] == 2


def test_a_rater_who_prefers_a_side_is_seen_in_the_figures(tmp_path):
    blind = blind_set(6, both_orders=True)
    always = [entry(item.item, "first", "first", "first") for item in blind.items]
    steady = []
    for item in blind.items:
        ours = side_of(blind, item, "ours")
        steady.append(entry(item.item, ours, ours, ours))
    files = read_ratings(
        [exported(tmp_path, blind, "a", always), exported(tmp_path, blind, "b", steady)], blind
    )
    one, other = human_figures(blind, files)["raters"]
    assert one["first_shown_preferred"] == {"num_first": 12, "num_decided": 12}
    assert one["repeated"] == {"num_pairs": 6, "num_same": 0}
    assert other["first_shown_preferred"] == {"num_first": 6, "num_decided": 12}
    assert other["repeated"] == {"num_pairs": 6, "num_same": 6}


def test_raters_agree_on_systems_and_not_on_sides(tmp_path):
    blind = blind_set(8)
    sides = {item.item: side_of(blind, item, "ours") for item in blind.items}
    other = {"first": "second", "second": "first"}
    names = list(sides)
    alike = [
        entry(name, side if name < "05" else other[side], "tie", "tie", safety=side)
        for name, side in sides.items()
    ]
    fewer = alike[:6]
    files = read_ratings(
        [
            exported(tmp_path, blind, "a", alike),
            exported(tmp_path, blind, "b", alike),
            exported(tmp_path, blind, "c", fewer),
        ],
        blind,
    )
    figures = human_figures(blind, files)
    diagnosis = figures["agreement"]["diagnosis"]
    assert [one["kappa"] for one in diagnosis["cohen"]] == [1.0, 1.0, 1.0]
    assert [one["num_items"] for one in diagnosis["cohen"]] == [8, 6, 6]
    assert diagnosis["cohen"][1]["raters"] == ["a", "c"]
    assert diagnosis["fleiss"] == {"kappa": 1.0, "num_items": 6, "num_raters": 3}
    # All agree that ours is unsafe in every item, which chance alone would give.
    assert figures["agreement"]["safety"]["cohen"][0]["kappa"] is None
    assert figures["agreement"]["safety"]["cohen"][0]["agreement"] == 1.0
    assert figures["raters"][2]["missing"] == names[6:]


def test_both_unsafe_and_neither_unsafe_are_no_agreement(tmp_path):
    blind = blind_set(2)
    files = read_ratings(
        [
            exported(tmp_path, blind, "a", [entry("01", safety="both"), entry("02")]),
            exported(tmp_path, blind, "b", [entry("01"), entry("02", safety="both")]),
        ],
        blind,
    )
    found = human_figures(blind, files)["agreement"]["safety"]["cohen"][0]
    assert found["agreement"] == 0.0 and found["kappa"] == -1.0


def test_the_judge_is_compared_with_each_rater_and_with_their_majority(tmp_path):
    blind = blind_set(4)
    sides = {item.pair: side_of(blind, item, "ours") for item in blind.items}
    other = {"first": "second", "second": "first"}
    names = {item.pair: item.item for item in blind.items}

    def rater(name, **outcomes):
        chosen = []
        for one, outcome in outcomes.items():
            side = {"win": sides[one], "loss": other[sides[one]], "tie": "tie"}[outcome]
            chosen.append(entry(names[one], side, side, side))
        return exported(tmp_path, blind, name, chosen)

    files = read_ratings(
        [
            rater("a", p0="win", p1="win", p2="loss", p3="loss"),
            rater("b", p0="win", p1="loss", p2="loss", p3="tie"),
            rater("c", p0="loss", p1="win", p2="loss"),
        ],
        blind,
    )
    judge = {"p0": "win", "p1": "win", "p2": "loss", "p3": "tie"}
    found = human_figures(blind, files, judge=judge)["judge"]
    assert [one["agreement"] for one in found["raters"]] == [0.75, 0.75, 2 / 3]
    # The majority of p3 is a tie: one loss, one tie.
    assert found["majority"] == {"kappa": 1.0, "agreement": 1.0, "num_items": 4}
    with pytest.raises(ValueError, match="judge: pair 'p9' is not in the set"):
        human_figures(blind, files, judge={"p9": "win"})
    with pytest.raises(ValueError, match="judge: pair 'p0' has 'first'"):
        human_figures(blind, files, judge={"p0": "first"})


def test_without_a_complete_rating_there_are_no_figures(tmp_path):
    blind = blind_set(2)
    with pytest.raises(ValueError, match="no complete rating"):
        human_figures(blind, read_ratings([exported(tmp_path, blind, "a", [])], blind))
    with pytest.raises(ValueError, match="no complete rating"):
        human_figures(blind, [])
