"""What tokens cost: a table in a JSON file that the user can replace.

The shipped table is an example: prices change, and nothing here can look them up. Whatever is
counted by it says so, and names it.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huatuo_jax.feedback.spending import Usage

SHIPPED = pathlib.Path(__file__).with_name("prices.json")

_SHOWN_TOKENS = 1_000_000
_DIGITS = 12  # Of a cost: far below any currency, so that sums of costs are the sums of prices.


@dataclass(frozen=True, kw_only=True)
class Price:
    """Money for one token of each sort.

    Attributes:
        input: a token of the prompt.
        cached_input: a token of the prompt that the server had in its cache.
        output: a token of the reply.
        currency: as the table says.
        table: the file it was read from.
        as_of: when the table was true, in its own words; None where it does not say.
    """

    input: float
    cached_input: float
    output: float
    currency: str
    table: str
    as_of: str | None = None

    @property
    def is_example(self) -> bool:
        """Whether it is of the shipped table, which nobody has checked for this run."""
        return pathlib.Path(self.table) == SHIPPED

    def __str__(self) -> str:
        """One line: the prices and whose they are, for the user to check."""
        prices = (
            f"{money * _SHOWN_TOKENS:.6g} {name}"
            for name, money in (
                ("in", self.input),
                ("in from its cache", self.cached_input),
                ("out", self.output),
            )
        )
        as_of = "no date" if self.as_of is None else f"as of {self.as_of}"
        told = f"prices in {self.currency} for a million tokens: {', '.join(prices)}"
        if self.is_example:
            return (
                f"{told}; from the example table that is shipped ({as_of}), NOT CHECKED: compare"
                f" them with your provider's, and give a copy of {self.table} by --prices"
            )
        return f"{told}; from your table {self.table} ({as_of})"

    def to_json(self) -> dict[str, Any]:
        """The prices of one token and where they are from, for a report."""
        return {**dataclasses.asdict(self), "is_example": self.is_example}

    def cost(self, usage: Usage) -> float:
        """What a call of these tokens costs."""
        fresh_tokens = usage.input_tokens - usage.cached_tokens
        money = fresh_tokens * self.input + usage.cached_tokens * self.cached_input
        return round(money + usage.output_tokens * self.output, _DIGITS)


def read_price(model: str, path: str | os.PathLike[str] | None = None) -> Price | None:
    """The price of a model by its exact name; None where the table does not have it.

    Args:
        model: as the server calls it.
        path: the user's table; None for the one that is shipped.

    Raises:
        ValueError: no such table, or one that cannot be.
    """
    path = pathlib.Path(SHIPPED if path is None else path)
    if not path.is_file():
        raise ValueError(f"prices: there is no file {path}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        currency, unit, models = table["currency"], table["per_tokens"], table["models"]
        as_of = str(table["as_of"]) if "as_of" in table else None
        row = models[model] if model in models else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"prices: {path} should be JSON with currency, per_tokens and models: {error}"
        ) from error
    if row is None:
        return None
    where = f"{path}: {model}"
    per_token = 1.0 / _number({"per_tokens": unit}, "per_tokens", where)
    fresh = _number(row, "input", where)
    cached = _number(row, "cached_input", where) if "cached_input" in row else fresh
    if cached > fresh:
        raise ValueError(f"prices: {where}: cached_input {cached} is above input {fresh}")
    return Price(
        input=fresh * per_token,
        cached_input=cached * per_token,
        output=_number(row, "output", where) * per_token,
        currency=str(currency),
        table=str(path),
        as_of=as_of,
    )


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    value: Any = row[name] if isinstance(row, Mapping) and name in row else None
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < 0 or (name == "per_tokens" and value == 0):
        raise ValueError(f"prices: {where}: {name} is {value!r}; it should be a number from 0 on")
    return float(value)
