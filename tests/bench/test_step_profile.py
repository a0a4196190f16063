"""The arithmetic of a breakdown, and that a measured one adds up."""

import pytest
import torch
from channels import Channels
from rich.console import Console

from metavpt import Budget, Fixed, Learned, MetaVPTError, OneStep, RunLog, Trainer
from metavpt.bench import cost_model, step_profile

PLAIN = {"step": 1.0, "step/learner/forward": 4.0, "step/learner/forward/teacher": 2.0}
UPDATE = {
    "step": 3.0,
    "step/designer/data/data": 1.0,
    "step/designer/product": 5.0,
    "step/designer/product/teacher": 2.0,
    "step/designer/phi/teacher": 1.0,
}


def test_a_phase_counts_where_it_occurs_and_is_shared_out_among_all_steps():
    found = {
        (phase.part, phase.phase): phase
        for phase in step_profile.spent([UPDATE, PLAIN, PLAIN, {**PLAIN, "step": 5.0}])
    }
    assert found["step", "step"].seconds == 2.0  # the median of 3, 1, 1, 5
    assert found["designer", "teacher"].seconds == 3.0  # two places of one phase
    assert found["designer", "teacher"].frequency == 0.25
    assert found["designer", "product"].per_step == 1.25
    assert found["step", "forward"].frequency == 0.75
    assert [key for key in found if key[0] == "designer"] == [
        ("designer", name) for name in ("data", "teacher", "product")
    ]


def trainer(folder, strategy):
    torch.manual_seed(0)
    return Trainer(Channels(), strategy, Budget(steps=10**6), RunLog(folder, Console(quiet=True)))


class Ticks:
    """Each glance at the clock finds it a second later."""

    def __init__(self):
        self.shown = 0.0

    def __call__(self):
        self.shown += 1.0
        return self.shown


def test_a_breakdown_sums_to_the_time_of_the_steps(tmp_path):
    """But for a glance at the clock that an update costs a phase of every step."""
    ticks, strategy = Ticks(), Learned(OneStep(), every=4, burn_in=100)
    measured = step_profile.measure(trainer(tmp_path, strategy), warmup=4, steps=8, now=ticks)
    totals = [sum(step.values()) for step in measured.seconds]
    assert measured.per_step == pytest.approx(sum(totals) / 8, rel=0.03)
    assert sum("step/designer/product/g_down" in step for step in measured.seconds) == 2
    phases = {(phase.part, phase.phase) for phase in measured.phases}
    assert phases >= {
        ("step", name)
        for name in ("data", "task", "forward", "backward", "optimizer", "ema", "learner")
    }
    assert phases >= {
        ("designer", name) for name in ("data", "task", "heads", "g_down", "product", "phi")
    }
    assert measured.flops["update"] > measured.flops["plain"] > 0
    assert measured.samples == 64


def test_a_report_names_the_lower_bound_and_its_ratio(tmp_path):
    run = trainer(tmp_path, Learned(OneStep(), every=2))
    now = step_profile.synchronized
    measured = step_profile.measure(run, 2, 4, now)
    bound = step_profile.lower_bound(run, now)
    assert bound is not None
    assert bound.seconds == pytest.approx(
        sum(count * bound.each[name] for name, count in bound.passes.items())
    )
    found = step_profile.report(measured, bound, "NVIDIA H100 80GB HBM3")
    assert found["over_lower_bound"] == pytest.approx(measured.per_step / bound.seconds)
    assert 0 < found["over_lower_bound_without_data_and_augmentation"] < found["over_lower_bound"]
    plain = sum(phase.per_step for phase in measured.phases if phase.part == "step")
    assert found["model_flops_utilisation"] == pytest.approx(
        measured.flops["plain"] / plain / 989e12
    )
    assert sum(phase["per_step"] for phase in found["phases"]) == pytest.approx(
        found["seconds_per_step"]
    )
    assert any("measured / lower bound" in line for line in step_profile.lines(found))
    assert step_profile.report(measured, None, None)["model_flops_utilisation"] is None


def test_steps_are_whole_periods():
    assert step_profile.num_steps(9, Learned(every=8)) == 16
    assert step_profile.num_steps(9, Fixed()) == 9
    with pytest.raises(MetaVPTError, match=r"measure\.steps=0"):
        step_profile.num_steps(0, Fixed())


def test_every_phase_that_is_no_pass_has_a_title():
    assert step_profile.TITLES.keys() >= cost_model.OUTSIDE
