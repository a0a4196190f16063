import time

import pytest

from metavpt.errors import MetaVPTError
from metavpt.training.budget import Budget


@pytest.mark.parametrize(
    ("limits", "charge"),
    [
        ({"steps": 4}, {"steps": 4}),
        ({"samples": 10}, {"samples": 12}),
        ({"grad_evals": 3}, {"grad_evals": 3}),
    ],
)
def test_any_unit_ends_the_run(limits, charge):
    budget = Budget(**limits)
    assert not budget.exhausted
    budget.charge(**charge)
    assert budget.exhausted
    assert budget.progress == 1.0


def test_the_tightest_limit_sets_the_progress():
    budget = Budget(steps=100, samples=1000)
    budget.charge(steps=10, samples=500)
    assert budget.progress == 0.5


def test_seconds_leave_probes_out_and_inner_clocks_stop_outer_ones():
    budget = Budget(seconds=100)
    with budget.timed("designer"):
        time.sleep(0.02)
        with budget.timed("data"):
            time.sleep(0.05)
    with budget.timed("probe"):
        time.sleep(0.05)
    assert budget.times["data"] >= 0.05
    assert 0.02 <= budget.times["designer"] < 0.05
    assert budget.seconds == pytest.approx(budget.times["data"] + budget.times["designer"])


def test_state_round_trip():
    budget = Budget(steps=10)
    budget.charge(steps=3, samples=6, grad_evals=4)
    with budget.timed("data"):
        pass
    other = Budget(steps=10)
    other.load_state_dict(budget.state_dict())
    assert other.state_dict() == budget.state_dict()


@pytest.mark.parametrize(
    ("limits", "words"),
    [({}, "no limit"), ({"steps": 0}, "budget.steps=0"), ({"seconds": -1}, "budget.seconds=-1")],
)
def test_bad_limits_are_named(limits, words):
    with pytest.raises(MetaVPTError, match=words):
        Budget(**limits)
