import pytest

from huatuo_jax.core.config import differences

SAVED = {
    "mlp": {"hidden": 11008, "bias": False, "activation": "silu"},
    "rope": {"type": "yarn", "factor": 4.0},
    "axes": ("data", "fsdp"),
    "sources": [{"name": "a", "weight": 1}, {"name": "b", "weight": 2}],
}


def changed(path, value):
    """A deep copy of the saved config with one field set, or removed where the value is None."""
    copy = {
        "mlp": dict(SAVED["mlp"]),
        "rope": dict(SAVED["rope"]),
        "axes": SAVED["axes"],
        "sources": [dict(source) for source in SAVED["sources"]],
    }
    *above, last = path
    below = copy
    for key in above:
        below = below[key]
    if value is None:
        del below[last]
    else:
        below[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("mlp", "hidden"), 14336, "mlp.hidden: saved 11008, now 14336"),
        (("mlp", "activation"), "gelu", 'mlp.activation: saved "silu", now "gelu"'),
        (("mlp", "bias"), 0, "mlp.bias: saved false, now 0"),
        (("mlp", "bias"), None, "mlp.bias: saved false, now absent"),
        (("rope", "scale"), [1], "rope.scale: saved absent, now [1]"),
        (("axes",), ["data"], 'axes: saved ["data", "fsdp"], now ["data"]'),
        (("sources", 1, "weight"), 3, "sources[1].weight: saved 2, now 3"),
        (("rope",), "none", 'rope: saved {"type": "yarn", "factor": 4.0}, now "none"'),
    ],
)
def test_each_difference_is_one_line(path, value, line):
    assert differences(SAVED, changed(path, value)) == [line]


def test_all_differences_are_listed_in_order():
    assert differences({"b": 1, "a": {"c": 2, "d": 3}}, {"b": 2, "a": {"c": 3, "d": 3}}) == [
        "a.c: saved 2, now 3",
        "b: saved 1, now 2",
    ]


def test_what_reads_back_from_json_the_same_is_no_difference():
    now = {**changed(("rope", "factor"), 4), "axes": ["data", "fsdp"]}
    assert differences(SAVED, now) == []
    assert differences({1: float("nan")}, {"1": float("nan")}) == []
    assert differences({}, {}) == []


def test_the_arguments_are_left_alone():
    saved, now = {"a": {"b": (1, 2)}}, {"a": {"b": (1, 3)}}
    differences(saved, now)
    assert (saved, now) == ({"a": {"b": (1, 2)}}, {"a": {"b": (1, 3)}})


def test_what_has_no_json_form_is_told():
    with pytest.raises(ValueError, match="current: must be made of JSON values"):
        differences({}, {"dtype": object()})
