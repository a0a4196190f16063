"""The learning rate follows the budget; updates come after the burn-in and then regularly."""

import math

import pytest

from metavpt import Budget, MetaVPTError
from metavpt.training.schedule import Period, WarmupCosine


def test_warmup_rises_linearly_to_one() -> None:
    schedule = WarmupCosine(warmup_steps=4)
    assert [schedule(step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_to_final_with_the_budget() -> None:
    schedule = WarmupCosine(final=0.1)
    assert schedule(0, 0.0) == pytest.approx(1.0, abs=1e-15)
    assert schedule(100, 1 / 3) == pytest.approx(
        0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2, abs=1e-15
    )
    assert schedule(999, 1.0) == pytest.approx(0.1, abs=1e-15)


@pytest.mark.parametrize("options", [{"warmup_steps": -1}, {"final": 1.5}, {"final": -0.1}])
def test_options_out_of_range_are_errors(options: dict[str, float]) -> None:
    with pytest.raises(MetaVPTError, match=next(iter(options))):
        WarmupCosine(**options)  # type: ignore[arg-type]


def updates(period, budget):
    """The steps at which an update is due, until the budget is spent."""
    due = []
    while not budget.exhausted:
        if period.due(budget):
            assert period.due(budget)  # asking twice changes nothing
            due.append(budget.steps)
        budget.charge(steps=1, samples=3)
        budget.clock.seconds["learner"] = 0.5 * budget.steps
    return due


@pytest.mark.parametrize(
    ("every", "burn_in", "limits", "expected"),
    [
        (8, 0, {"steps": 20}, [0, 8, 16]),
        (8, 5, {"steps": 20}, [5, 13]),
        (8, 0.1, {"steps": 20}, [2, 10, 18]),
        (8, 0.1, {"steps": 400}, list(range(40, 400, 8))),
        (8, 0.1, {"steps": 3}, [1]),  # a run of three steps is steered too
        (1, 0.5, {"steps": 4}, [2, 3]),
        (4, 0.25, {"samples": 36}, [3, 7, 11]),
        (4, 0.25, {"seconds": 6.0}, [3, 7, 11]),
        (8, 30, {"steps": 20}, []),
    ],
)
def test_period_starts_after_burn_in_in_steps_or_as_a_share_of_any_budget(
    every, burn_in, limits, expected
):
    assert updates(Period(every, burn_in), Budget(**limits)) == expected


def test_period_resumes_where_it_was():
    whole, budget = Period(3, 0.25), Budget(seconds=10.0)
    expected = updates(whole, budget)
    first, second, budget = Period(3, 0.25), Period(3, 0.25), Budget(seconds=10.0)
    due = []
    while not budget.exhausted:
        period = first if budget.steps < 9 else second
        if budget.steps == 9:
            second.load_state_dict(first.state_dict())
        if period.due(budget):
            due.append(budget.steps)
        budget.charge(steps=1)
        budget.clock.seconds["learner"] = 0.5 * budget.steps
    assert due == expected
    assert len(expected) > 3


@pytest.mark.parametrize(("every", "burn_in"), [(0, 0), (8, -1), (8, -0.1), (8, 1.5)])
def test_period_refuses_what_is_no_period(every, burn_in):
    with pytest.raises(MetaVPTError, match=f"every={every} .* burn_in={burn_in} "):
        Period(every, burn_in)
