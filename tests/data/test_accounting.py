"""Accounts of data: the sums add up, each reason has its line, and a share decides."""

import json

import pytest

from huatuo_jax.data.accounting import (
    BAD_ROW,
    HELD_OUT,
    NOT_RENDERED,
    READ_FROM,
    TOO_LONG,
    TRAINED_ON,
    Account,
    check_share,
    placed,
)
from huatuo_jax.data.readers import read_dialogues, read_prompts


def account(*, used, too_long=0, others=0):
    made = Account("prompts")
    made.use(TRAINED_ON, used)
    for line in range(too_long):
        made.leave_out(TOO_LONG, f"p.jsonl:{line + 1}", "90 tokens")
    for line in range(others):
        made.leave_out("the same again", f"p.jsonl:{line + 1}")
    return made


def test_rows_and_records_add_up_and_each_reason_has_its_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"question": f"头疼{n}天", "answer": "多喝水。"} for n in range(9)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([*lines[:4], "{", *lines[4:]]) + "\n", encoding="utf-8")
    reading = read_dialogues(path, max_error_share=0.5)
    made = Account("dialogues")
    for number, (place, _) in enumerate(placed(reading)):
        if number < 3:
            made.leave_out(TOO_LONG, place, "does not fit 8 tokens")
        elif number == 3:
            made.put_aside("over the limit of mine")
        else:
            made.use(HELD_OUT if number == 4 else TRAINED_ON)
    made.add_rows(reading)
    assert (made.rows, made.rows_used, made.rows_left_out) == (10, 9, {BAD_ROW: 1})
    assert made.records == 9 and made.used == {TRAINED_ON: 4, HELD_OUT: 1}
    first, bad, long, warning = made.lines()
    assert first == (
        "10 rows read, 9 dialogues: 1 held out, 4 to train on, 1 over the limit of mine; "
        "left out: 3 dialogues; 1 rows"
    )
    assert bad.startswith(f"left out, bad row: 1, such as {path}:5: not JSON")
    assert long == f"left out, too long: 3, such as {path}:1: does not fit 8 tokens"
    assert warning.startswith("warning: 40% of the data is left out (bad row 1, too long 3)")


def test_nothing_left_out_is_one_line_and_a_single_one_is_no_warning():
    assert account(used=5).lines() == ["5 prompts: 5 to train on; left out: 0 prompts"]
    assert len(account(used=5, too_long=1).lines()) == 2
    assert len(account(used=5, too_long=2).lines()) == 3
    assert len(account(used=50, too_long=2).lines()) == 2


def test_an_account_comes_back_from_json():
    made = account(used=5, too_long=9, others=1)
    made.put_aside("over the limit", 2, used_for=TRAINED_ON)
    again = Account.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made and again.lines() == made.lines()
    assert len(again.places[TOO_LONG]) == 5


@pytest.mark.parametrize(
    ("used", "too_long", "share", "refused"),
    [
        (90, 10, 0.1, False),
        (89, 11, 0.1, True),
        (1, 1, 0.1, False),  # One never stops a run,
        (1, 1, 0.0, True),  # unless none may.
        (0, 1, 1.0, True),
        (0, 0, 1.0, True),
        (1, 99, 1.0, False),
    ],
)
def test_a_share_decides_how_many_may_be_too_long(used, too_long, share, refused):
    made = account(used=used, too_long=too_long)
    if not refused:
        made.check(share, name="max_left_out_share", limit="max_length=8")
        return
    with pytest.raises(ValueError, match="used with max_length=8") as error:
        made.check(share, name="max_left_out_share", limit="max_length=8")
    if used:
        said = f"{too_long} of {used + too_long} prompts cannot be used with max_length=8, more"
        assert str(error.value).startswith(f"{said} than max_left_out_share={share:g} allows (too")
        assert "p.jsonl:1: 90 tokens" in str(error.value)


def test_reasons_that_are_not_about_length_do_not_count_against_the_share():
    account(used=1, too_long=1, others=90).check(0.1, name="share", limit="8")
    made = account(used=1, too_long=1)
    made.leave_out(NOT_RENDERED, "p.jsonl:9", "no such token")
    with pytest.raises(ValueError, match="2 of 3 prompts .*too long 1, cannot be rendered 1"):
        made.check(0.1, name="share", limit="8")


def test_a_record_that_was_made_from_another_file_is_named_by_that(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"question": "头疼"}, {"question": "咳嗽", READ_FROM: "mine.csv:17"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    places = [place for place, _ in placed(read_prompts(path))]
    assert places == [f"{path}:1", "mine.csv:17"]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="max_left_out_share=.* must lie between 0 and 1"):
        check_share(share, name="max_left_out_share")
