import time

import pytest

from huatuo_jax.judge.spending import SpendingFile, Totals, Usage


def spend(path):
    """Five calls: answered, refused, cut off, under way, and one without usage."""
    file = SpendingFile(path)
    numbers = [file.start(max_tokens=100, max_cost=1.5) for _ in range(5)]
    answered = Usage(input_tokens=40, output_tokens=7, cached_tokens=3)
    file.end(numbers[0], outcome="answered", usage=answered, cost=0.1, refused=False)
    file.end(numbers[1], outcome="HTTP 429", usage=None, cost=0.0, refused=False)
    file.end(numbers[2], outcome="time-out", usage=None, cost=None, refused=False)
    file.end(numbers[4], outcome="answered", usage=None, cost=None, refused=False)
    return file


def test_what_was_spent_is_the_same_after_a_kill(tmp_path):
    path = tmp_path / "spending.jsonl"
    file = spend(path)
    totals = Totals(
        requests=5,
        unknown_requests=3,
        usage=Usage(input_tokens=40, output_tokens=7, cached_tokens=3),
        cost=0.1,
        unknown_cost=4.5,
    )
    assert file.totals() == totals
    file.close()  # As a kill would: nothing is written here.
    with path.open("ab") as torn:
        torn.write(b'{"call": 5, "time')
    again = SpendingFile(path)
    assert again.totals() == totals
    assert again.start(max_tokens=1, max_cost=0.0) == 5
    again.close()
    assert SpendingFile(path).totals().requests == 6


def test_sums_of_money_are_exact():
    file = SpendingFile(None)
    for _ in range(1000):
        number = file.start(max_tokens=1, max_cost=0.3)
        file.end(number, outcome="answered", usage=Usage(), cost=0.1, refused=False)
    assert (file.totals().cost, file.totals().unknown_cost) == (100.0, 0.0)


def test_recent_calls_count_with_what_they_took_or_may_have_taken(tmp_path):
    file = spend(tmp_path / "spending.jsonl")
    recent = file.recent(60.0)
    assert [call.tokens for call in recent] == [47, 0, 100, 100, 100]
    assert all(0 <= call.age_s < 30 for call in recent)
    time.sleep(0.02)
    assert file.recent(0.01) == []
    file.close()


def test_only_refusals_leave_no_file(tmp_path):
    path = tmp_path / "deep" / "spending.jsonl"
    file = SpendingFile(path)
    assert not path.parent.exists()
    number = file.start(max_tokens=1, max_cost=1.0)
    assert path.exists()
    file.end(number, outcome="HTTP 401", usage=None, cost=0.0, refused=True)
    file.close()
    assert not path.exists()


def test_two_runs_cannot_share_a_file(tmp_path):
    file = spend(tmp_path / "spending.jsonl")
    with pytest.raises(ValueError, match="another process writes this file"):
        SpendingFile(tmp_path / "spending.jsonl")
    file.close()
    SpendingFile(tmp_path / "spending.jsonl").close()


@pytest.mark.parametrize("line", ["[]", "{}", '{"call": 3}', '{"call": 0, "outcome": "x"}', "x"])
def test_another_file_is_refused_and_left_as_it_is(tmp_path, line):
    path = tmp_path / "spending.jsonl"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"spending\.jsonl:1: (no|not a) line|:1: holds"):
        SpendingFile(path)
    assert path.read_text(encoding="utf-8") == f"{line}\n"
