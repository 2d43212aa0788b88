import datetime
import decimal
import json
import pathlib
import uuid

import numpy as np
import pytest

from huatuo_jax.data import text as json_values
from huatuo_jax.data.text import MAX_DEPTH, NotJson, json_value

# Value, what JSON gets, and the rule that is said (None: nothing was lost).
CONVERTED = [
    ("祝好", "祝好", None),
    ("祝好\ud83d", "祝好\ufffd", json_values.HALF_CHARACTER),
    ("\ude00祝\ud83d好", "\ufffd祝\ufffd好", json_values.HALF_CHARACTER),
    (float("nan"), None, json_values.NOT_A_NUMBER),
    (np.float32("nan"), None, json_values.NOT_A_NUMBER),
    (np.datetime64("NaT"), None, json_values.NOT_A_NUMBER),
    (decimal.Decimal("NaN"), None, json_values.NOT_A_NUMBER),
    (datetime.datetime(2020, 1, 2, 3, 4, 5), "2020-01-02T03:04:05", json_values.TIME_TEXT),
    (
        datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC),
        "2020-01-02T00:00:00+00:00",
        json_values.TIME_TEXT,
    ),
    (datetime.date(2020, 1, 2), "2020-01-02", json_values.TIME_TEXT),
    (datetime.time(3, 4), "03:04:00", json_values.TIME_TEXT),
    (np.datetime64("2020-01-02T03:04"), "2020-01-02T03:04", json_values.TIME_TEXT),
    (datetime.timedelta(minutes=1.5), 90.0, json_values.DURATION),
    (np.timedelta64(3, "s"), 3.0, json_values.DURATION),
    (decimal.Decimal("12.50"), 12.5, json_values.DECIMAL),
    (decimal.Decimal("0.12345678901234567890"), "0.12345678901234567890", json_values.DECIMAL),
    (decimal.Decimal("1e999"), "1E+999", json_values.DECIMAL),
    ("头痛".encode(), "头痛", json_values.BYTES),
    (uuid.UUID(int=3), "00000000-0000-0000-0000-000000000003", json_values.AS_TEXT),
    (pathlib.PurePosixPath("a/b"), "a/b", None),
    (np.int64(3), 3, None),
    (np.bool_(True), True, None),
    (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]], None),
    ((1, ("a", None)), [1, ["a", None]], None),
    ({3, 1}, [1, 3], None),
    ([{"a": [float("nan")]}], [{"a": [None]}], json_values.NOT_A_NUMBER),
    ({"k\ud83d": {1: True}}, {"k\ufffd": {"1": True}}, json_values.HALF_CHARACTER),
]


@pytest.mark.parametrize(("value", "expected", "rule"), CONVERTED)
def test_each_kind_of_value_becomes_json_by_its_rule_and_the_rule_is_said(value, expected, rule):
    row, notes = json_value({"id": "a", "own": value})
    assert row == {"id": "a", "own": expected}
    assert type(row["own"]) is type(expected)
    if rule is not None:
        assert notes == (f"own: {rule}",)
    text = json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    assert json.loads(text) == row


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"\xff\xd8", "own: holds bytes that are not UTF-8 text"),
        (float("inf"), "own: holds an infinite number"),
        (np.float64("-inf"), "own: holds an infinite number"),
        (decimal.Decimal("Infinity"), "own: holds an infinite number"),
        (1j, "own: holds a complex, which JSON cannot write"),
        (object(), "own: holds a object, which JSON cannot write"),
        ({"1": "a", 1: "b"}, "own: two fields are named 1 as text"),
        ({(1, 2): "a"}, "own: a field's name is tuple"),
    ],
)
def test_what_json_cannot_stand_for_is_named_with_its_column(value, said):
    with pytest.raises(NotJson, match=said):
        json_value({"id": "a", "own": value})


def test_nesting_ends_at_a_depth_that_every_writer_can_write():
    def nested(depth):
        value = "a"
        for _ in range(depth):
            value = [value]
        return value

    assert json_value(nested(MAX_DEPTH)).value == nested(MAX_DEPTH)
    for depth in (MAX_DEPTH + 1, 5_000):
        with pytest.raises(NotJson, match=f"nested deeper than {MAX_DEPTH} levels"):
            json_value({"own": nested(depth)})
