import json

import pytest

from huatuo_jax.judge.spending import SHIPPED, Usage, read_price


def table(tmp_path, **changed):
    content = {
        "currency": "CNY",
        "per_tokens": 1000,
        "models": {
            "a": {"input": 2.0, "cached_input": 0.5, "output": 10.0},
            "b": {"input": 0, "output": 0},
        },
    }
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(content | changed), encoding="utf-8")
    return path


def test_a_call_costs_its_tokens_times_their_prices(tmp_path):
    price = read_price("a", table(tmp_path))
    usage = Usage(input_tokens=700, output_tokens=30, cached_tokens=200)
    assert price.cost(usage) == pytest.approx(500 * 0.002 + 200 * 0.0005 + 30 * 0.01, abs=1e-12)
    assert price.currency == "CNY"
    assert read_price("b", table(tmp_path)).cost(usage) == 0


def test_a_model_that_the_table_lacks_has_no_price_and_similar_names_do_not_count(tmp_path):
    assert read_price("a-mini", table(tmp_path)) is None


def test_every_price_of_the_shipped_table_can_be_read():
    models = json.loads(SHIPPED.read_text(encoding="utf-8"))["models"]
    for model in models:
        price = read_price(model)
        assert 0 < price.cached_input <= price.input < price.output < 1e-3


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"models": {"a": {"input": 1.0}}}, "output is None"),
        ({"models": {"a": {"input": -1.0, "output": 1.0}}}, "input is -1.0"),
        ({"models": {"a": {"input": True, "output": 1.0}}}, "input is True"),
        ({"models": {"a": {"input": "1", "output": 1.0}}}, "input is '1'"),
        ({"models": {"a": {"input": 1, "cached_input": 2, "output": 1}}}, "cached_input 2.0"),
        ({"per_tokens": 0}, "per_tokens is 0"),
        ({"models": None}, "should be JSON with"),
    ],
)
def test_a_table_that_cannot_be_is_refused(tmp_path, changed, why):
    with pytest.raises(ValueError, match=why):
        read_price("a", table(tmp_path, **changed))


def test_a_price_says_whose_it_is(tmp_path):
    told = str(read_price("a", table(tmp_path, as_of="May")))
    assert "2000 in, 500 in from its cache, 10000 out" in told and "CNY" in told
    assert f"from your table {tmp_path / 'prices.json'} (as of May)" in told
    assert "NOT CHECKED" not in told and "(no date)" in str(read_price("a", table(tmp_path)))
    shipped = read_price("gpt-4o")
    assert shipped.is_example and shipped.to_json()["is_example"]
    assert "NOT CHECKED" in str(shipped) and "--prices" in str(shipped)


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_price("a", tmp_path / "none.json")
