"""A budget of requests and of money that no run can exceed, nor all runs of a file together."""

import asyncio
import math
from dataclasses import dataclass

from huatuo_jax.feedback.judges import JudgeUnusable
from huatuo_jax.feedback.rate_limits import Passage
from huatuo_jax.feedback.spending import SpendingFile, Usage


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What all calls of one labels file together may take, over all its runs.

    Attributes:
        max_requests: calls, those that fail too; None for no limit.
        max_cost: money in the currency of the price table; None for no limit.
    """

    max_requests: int | None = None
    max_cost: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a budget below nothing."""
        for name in ("max_requests", "max_cost"):
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or value < 0):
                raise ValueError(f"{name}={value} must be a number from 0 on")


class Reservation:
    """Part of the budget, held for one call from before it is sent until it has ended."""

    def __init__(self, budget: "Budget", *, max_tokens: int, max_cost: float) -> None:
        """Made by `Budget.reserve`."""
        self._budget, self._number = budget, -1
        self._passage = Passage(0.0, max_tokens)
        self.max_tokens, self.max_cost = max_tokens, max_cost

    def start(self, passage: Passage) -> None:
        """Write down that the call is sent now; it counts from here on, whatever happens.

        Args:
            passage: through the rate limits.
        """
        self._passage = passage
        self._number = self._budget.spending.start(
            max_tokens=self.max_tokens, max_cost=self.max_cost
        )
        self._budget.started(self)

    def end(
        self, *, outcome: str, usage: Usage | None, cost: float | None, refused: bool = False
    ) -> None:
        """Put the call's cost in place of what was held for it.

        Args:
            outcome: in a word or two.
            usage: tokens, where the server told.
            cost: money; None where it cannot be known, and then all that was held stays counted.
            refused: the server did not take the question at all.
        """
        self._budget.spending.end(
            self._number, outcome=outcome, usage=usage, cost=cost, refused=refused
        )
        if usage is not None:
            self._passage.took(usage.input_tokens + usage.output_tokens)
        elif cost is not None:
            self._passage.took(0)
        self._budget.ended()

    def cancel(self) -> None:
        """Give back what was held for a call that was never sent."""
        self._budget.cancelled(self)


class Budget:
    """Lets a call start only where the most that it may take is still there."""

    def __init__(self, cfg: BudgetConfig, spending: SpendingFile) -> None:
        """Start with what earlier runs spent.

        Args:
            cfg: how much there is.
            spending: what is spent.
        """
        self._cfg, self.spending = cfg, spending
        self._held: set[Reservation] = set()  # Reserved, and not started.
        self._under_way = 0
        self._changed = asyncio.Event()

    async def reserve(self, *, max_tokens: int, max_cost: float) -> Reservation:
        """Hold the most that a call may take.

        Where only calls under way stand against it, their end is waited for, as they mostly cost
        less than what is held for them.

        Raises:
            JudgeUnusable: it is not there.
        """
        while lack := self._lack(max_cost):
            if not self._held and not self._under_way:
                raise JudgeUnusable(lack)
            self._changed.clear()
            await self._changed.wait()
        reservation = Reservation(self, max_tokens=max_tokens, max_cost=max_cost)
        self._held.add(reservation)
        return reservation

    def started(self, reservation: Reservation) -> None:
        """Note that a call was sent."""
        self._held.remove(reservation)
        self._under_way += 1

    def ended(self) -> None:
        """Note that a call under way has ended."""
        self._under_way -= 1
        self._changed.set()

    def cancelled(self, reservation: Reservation) -> None:
        """Note that a call will not be sent."""
        self._held.remove(reservation)
        self._changed.set()

    def _lack(self, max_cost: float) -> str | None:
        """What the budget lacks for one more call; None where nothing."""
        totals = self.spending.totals()
        requests = totals.requests + len(self._held)
        limit = self._cfg.max_requests
        if limit is not None and requests + 1 > limit:
            return f"max_requests={limit} is spent: {totals.requests} requests were sent"
        if self._cfg.max_cost is None:
            return None
        held = math.fsum(reservation.max_cost for reservation in self._held)
        spent = totals.cost + totals.unknown_cost
        if spent + held + max_cost > self._cfg.max_cost:
            return (
                f"max_cost={self._cfg.max_cost:g} does not allow the next call: {spent:.6g} are "
                f"spent and it may cost {max_cost:.6g}"
            )
        return None
