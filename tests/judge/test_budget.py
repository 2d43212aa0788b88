import asyncio

import pytest

from huatuo_jax.judge.judgements import JudgeUnusable
from huatuo_jax.judge.spending import Budget, BudgetConfig, Passage, SpendingFile, Usage


def run(cfg, calls, spending=None):
    """Makes calls of (most, real cost or None) side by side; returns what was spent, and errors."""
    spending = spending or SpendingFile(None)

    async def one(budget, max_cost, cost):
        reservation = await budget.reserve(max_tokens=10, max_cost=max_cost)
        await asyncio.sleep(0)
        reservation.start(Passage(0.0, 10))
        totals = spending.totals()
        assert cfg.max_cost is None or totals.cost + totals.unknown_cost <= cfg.max_cost
        await asyncio.sleep(0.01)
        reservation.end(outcome="x", usage=None if cost is None else Usage(), cost=cost)

    async def all_of_them():
        budget = Budget(cfg, spending)
        made = [one(budget, *call) for call in calls]
        return await asyncio.gather(*made, return_exceptions=True)

    errors = [error for error in asyncio.run(all_of_them()) if error is not None]
    assert all(isinstance(error, JudgeUnusable) for error in errors), errors
    return spending.totals(), errors


def test_calls_wait_for_what_the_others_do_not_take():
    totals, errors = run(BudgetConfig(max_cost=10.0), [(4.0, 0.5)] * 12)
    assert (totals.requests, totals.cost, errors) == (12, 6.0, [])


def test_money_ends_before_it_is_exceeded():
    totals, errors = run(BudgetConfig(max_cost=10.0), [(4.0, 2.0)] * 12)
    assert totals.cost == 8.0 and len(errors) == 8
    assert "max_cost=10 does not allow the next call: 8 are spent and it may cost 4" in str(
        errors[0]
    )


def test_a_call_of_unknown_cost_counts_with_the_most_it_may_have_cost():
    totals, errors = run(BudgetConfig(max_cost=10.0), [(4.0, None)] * 3)
    assert (totals.requests, totals.unknown_cost, len(errors)) == (2, 8.0, 1)


def test_requests_are_counted_one_by_one():
    totals, errors = run(BudgetConfig(max_requests=5), [(4.0, 1.0)] * 8)
    assert totals.requests == 5 and len(errors) == 3
    assert "max_requests=5 is spent: 5 requests were sent" in str(errors[-1])


def test_what_earlier_runs_spent_counts(tmp_path):
    cfg = BudgetConfig(max_cost=10.0)
    for expected in (3, 4, 4):
        spending = SpendingFile(tmp_path / "spending.jsonl")
        totals, _ = run(cfg, [(4.0, 2.0)] * min(expected, 3), spending)
        assert totals.requests == expected
        spending.close()


@pytest.mark.parametrize("fields", [{"max_requests": 0}, {"max_cost": 0.0}])
def test_a_budget_of_nothing_lets_nothing_through(fields):
    totals, errors = run(BudgetConfig(**fields), [(0.1, 0.1)])
    assert totals.requests == 0 and f"{next(iter(fields))}=0" in str(errors[0])


def test_a_reservation_that_is_cancelled_is_free_again():
    async def both():
        budget = Budget(BudgetConfig(max_requests=1), SpendingFile(None))
        first = await budget.reserve(max_tokens=1, max_cost=0.0)
        waiting = asyncio.create_task(budget.reserve(max_tokens=1, max_cost=0.0))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        first.cancel()
        return await asyncio.wait_for(waiting, 5.0)

    assert asyncio.run(both()).max_tokens == 1


@pytest.mark.parametrize("fields", [{"max_requests": -1}, {"max_cost": -0.5}, {"max_cost": 1e999}])
def test_a_budget_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        BudgetConfig(**fields)
