"""Collapse is told from health, and the warning names what to turn."""

import math

import pytest
import torch
from channels import Channels
from helpers.small_dino import SMALL, UNET
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from metavpt import Budget, Fixed, Learned, MetaVPTError, OneStep, RunLog, Trainer
from metavpt.probes.spectrum import rankme
from metavpt.training.health import (
    HealthMetric,
    Spread,
    Watch,
    gate_signs,
    mask_signs,
    outcome_signs,
    rank_sign,
    untouched,
)


def test_a_sign_is_held_against_its_bounds_and_against_what_it_was_at_first():
    watch = Watch()
    assert (
        watch(
            {
                "rank": HealthMetric(8.0, "turn this", keep=0.5),
                "share": HealthMetric(0.2, "turn that", high=0.9),
            }
        )
        == []
    )
    assert watch({"rank": HealthMetric(4.0, "turn this", keep=0.5)}) == []
    assert watch({"rank": HealthMetric(3.9, "turn this", keep=0.5)}) == [
        "rank is 3.9, at first it was 8: turn this"
    ]
    assert watch({"share": HealthMetric(0.95, "turn that", high=0.9)}) == [
        "share is 0.95, at first it was 0.2: turn that"
    ]
    assert len(watch({"rank": HealthMetric(math.nan, "turn this")})) == 1


def test_what_was_first_survives_a_checkpoint():
    watch, resumed = Watch(), Watch()
    watch({"rank": HealthMetric(8.0, "")})
    resumed.load_state_dict(watch.state_dict())
    assert resumed({"rank": HealthMetric(1.0, "turn this", keep=0.5)})


@pytest.mark.parametrize(
    ("probs", "entropy", "information"),
    [
        (torch.eye(8), 0.0, 1.0),
        (torch.full((5, 8), 1 / 8), 1.0, 0.0),
        (torch.eye(8)[[3] * 5], 0.0, 0.0),
        (torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]), 0.5, 0.5),
    ],
    ids=["healthy", "uniform", "one outcome", "half"],
)
def test_entropy_and_information_of_known_distributions(probs, entropy, information):
    spread = Spread.of(probs)
    assert spread.entropy == pytest.approx(entropy, abs=1e-12)
    assert spread.information == pytest.approx(information, abs=1e-12)


@pytest.mark.parametrize(
    ("probs", "knob"),
    [
        (torch.full((8, 8), 1 / 8), "teacher_temperature"),
        (torch.eye(8)[[3] * 8], "problem.targets=sinkhorn"),
    ],
)
def test_both_collapses_of_prototypes_are_told_apart(probs, knob):
    watch = Watch()
    assert watch(outcome_signs(torch.eye(8))) == []
    (line,) = watch(outcome_signs(probs))
    assert line.startswith("output_information is")
    assert knob in line


def test_features_on_a_line_have_lost_their_rank():
    rng = torch.Generator().manual_seed(0)
    healthy, line = (
        torch.randn(64, 16, generator=rng),
        torch.randn(64, 1, generator=rng) * torch.ones(16),
    )
    watch = Watch()
    assert watch({"feature_rank": rank_sign(rankme(healthy))}) == []
    assert "trainer.optimizer.lr" in watch({"feature_rank": rank_sign(rankme(line))})[0]


def test_a_dino_learner_that_answers_all_images_alike_is_told():
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", [*SMALL, *UNET])
    torch.manual_seed(0)
    problem, watch = instantiate(cfg.problem, _convert_="all"), Watch()
    signs = problem.health_metrics()
    assert signs.keys() == {"feature_rank", "hidden_share", "output_entropy", "output_information"}
    assert signs["hidden_share"].value == 0.0
    assert watch(signs) == []
    assert {name: sign.value for name, sign in problem.health_metrics().items()} == {
        name: sign.value for name, sign in signs.items()
    }
    with torch.no_grad():
        for module in (problem.learner, problem.teacher):
            for name, p in module.named_parameters():
                if name.endswith("trunk.patch_embed.proj.weight"):
                    p.zero_()  # every image looks the same
    lines = watch(problem.health_metrics())
    assert [line.split()[0] for line in lines] == ["feature_rank", "output_information"]


def test_masks_and_gates_at_the_end_of_their_range():
    assert Watch()(mask_signs([torch.ones(4), None])) == []
    assert mask_signs([None]) == {}
    assert "designer.keep" in Watch()(mask_signs([torch.zeros(2, 3), torch.zeros(4)]))[0]
    assert Watch()(gate_signs(torch.zeros(2, 3), 0.5)) == []
    assert "designer.excess_weight" in Watch()(gate_signs(torch.full((2, 3), 0.5), 0.5))[0]


def test_a_run_logs_its_signs_at_every_probe_and_warns(tmp_path):
    class Watched(Channels):
        def health_metrics(self):
            self.looks = getattr(self, "looks", 0) + 1
            return {"rank": HealthMetric(8.0 / self.looks, "turn this", keep=0.3)}

    trainer = Trainer(Watched(), Fixed(), Budget(steps=6), RunLog(tmp_path), probe_every=2)
    trainer.run()
    logged = trainer.log.records()
    assert [(r["step"], r["rank"]) for r in logged if r["kind"] == "watch"] == [
        (0, 8.0),
        (2, 4.0),
        (4, 8 / 3),
        (6, 2.0),
    ]
    assert [r["message"] for r in logged if r["kind"] == "warning"] == [
        "rank is 2, at first it was 8: turn this"
    ]


class Leaky(Fixed):
    def __init__(self, leak, at):
        self.leak, self.at = leak, at

    def next_task(self, state):
        if state.budget.steps == self.at:
            self.leak(state.problem, next(state.streams.feedback))
        return super().next_task(state)


def backward(problem, labelled):
    problem.feedback_loss(dict(problem.learner.named_parameters()), labelled).backward()


def write(problem, labelled):
    with torch.no_grad():
        problem.learner[1].bias.add_(labelled[1].mean())


def optimizer_step(problem, labelled):
    optimizer = torch.optim.SGD(problem.learner.parameters(), lr=1e-3)
    backward(problem, labelled)
    optimizer.step()
    optimizer.zero_grad()


LEAKS = {
    backward: r"left a gradient in learner\.0\.weight\.grad",
    write: r"wrote to learner\.1\.bias",
    optimizer_step: r"wrote to learner\.",
}


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    ("leak", "words"), LEAKS.items(), ids=lambda value: getattr(value, "__name__", None)
)
def test_a_strategy_that_trains_the_learner_on_labels_is_stopped(tmp_path, leak, words, at):
    trainer = Trainer(Channels(), Leaky(leak, at), Budget(steps=6), RunLog(tmp_path))
    with pytest.raises(MetaVPTError, match=rf"Leaky\.next_task {words}"):
        trainer.run()
    assert trainer.budget.steps == at


@given(which=st.integers(0, 3), kind=st.sampled_from(["grad", "copy_", "mul_", "zero_"]))
@settings(max_examples=30, deadline=None)
def test_every_parameter_and_every_way_to_write_is_seen(which, kind):
    learner = Channels().learner
    name, p = list(learner.named_parameters())[which]
    with pytest.raises(MetaVPTError, match=rf"learner\.{name}"), untouched(learner, "this"):
        touch(p, kind)


def touch(p, kind):
    if kind == "grad":
        p.grad = torch.zeros_like(p)
    else:
        with torch.no_grad():
            getattr(p, kind)(*{"copy_": [p + 1], "mul_": [2.0]}.get(kind, []))


def test_designer_updates_pass(tmp_path):
    trainer = Trainer(
        Channels(),
        Learned(OneStep(), every=1),
        Budget(steps=3),
        RunLog(tmp_path),
        first_order_every=1,
    )
    trainer.run()
    assert trainer.budget.steps == 3


def test_bounds_state_the_range_that_the_verdict_goes_by() -> None:
    watch = Watch()
    assert watch({"rank": HealthMetric(10.0, "", keep=0.3)}) == []
    now = {
        "rank": HealthMetric(2.9, "turn", keep=0.3),
        "hidden": HealthMetric(0.5, "", high=0.95),
        "entropy": HealthMetric(0.5, ""),
    }
    assert watch.bounds(now) == {
        "rank": [pytest.approx(3.0), None], "hidden": [None, 0.95], "entropy": [None, None]
    }  # fmt: skip
    assert len(watch(now)) == 1


def test_a_regularizer_that_makes_up_the_gradient_for_long_is_a_warning_once():
    """After 20 updates in a row above 0.95; steps without an update do not count."""
    watch = Watch()
    high, low = {"regularizer_share": 0.97}, {"regularizer_share": 0.95}
    assert [watch.check_regularizer(high) for _ in range(19)] == [None] * 19
    assert watch.check_regularizer(low) is None  # begins again
    assert [watch.check_regularizer(high) for _ in range(19)] == [None] * 19
    assert watch.check_regularizer({}) is None
    resumed = Watch()
    resumed.load_state_dict(watch.state_dict())
    for each in (watch, resumed):
        warning = each.check_regularizer(high)
        assert warning is not None
        assert "regularizer_share 0.970" in warning
        assert [each.check_regularizer(record) for record in (high, low, *[high] * 25)] == [
            None
        ] * 27
