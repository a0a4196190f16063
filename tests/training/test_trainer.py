"""Invariants of the loop on the README's problem: an autoencoder too narrow for its channels."""

import json

import pytest
import torch
from channels import Channels
from torch import nn

from metavpt import (
    Budget,
    Checkpoints,
    Cosine,
    Fixed,
    Implicit,
    Learned,
    MetaVPTError,
    NonFiniteError,
    OneStep,
    RunLog,
    Trainer,
    Unrolled,
)

ESTIMATORS = {
    "one_step": OneStep(Cosine()),
    "unrolled": Unrolled(2),
    "implicit": Implicit(damping=1e-2),
}


def adam(parameters, lr=0.05):
    return torch.optim.Adam(parameters, lr=lr)


def train(folder, problem=None, strategy=None, seed=0, steps=24, resume=False, **options):
    torch.manual_seed(seed)
    problem = problem or Channels()
    budget = options.pop("budget", None) or Budget(steps=steps)
    checkpoints = Checkpoints(folder / "checkpoints")
    optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-2)
    options = {
        "optimizer": optimizer,
        "log_every": 4,
        "probe_every": 8,
        "checkpoint_every": 6,
        **options,
    }
    trainer = Trainer(
        problem, strategy or Fixed(), budget, RunLog(folder), checkpoints, seed=seed, **options
    )
    if resume:
        trainer.resume()
    trainer.run()
    return trainer


def weights(trainer):
    return {
        f"{part}.{k}": v.clone()
        for part in ("learner", "designer")
        for k, v in getattr(trainer.problem, part).state_dict().items()
    }


def records(folder):
    """The log without what depends on the clock."""
    clock = {"seconds", "samples_per_s"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_learned_with_designer_lr_0_is_fixed_bit_for_bit(tmp_path, estimator):
    fixed = train(tmp_path / "fixed")
    learned = train(
        tmp_path / "learned", strategy=Learned(estimator, lambda p: adam(p, lr=0.0), every=2)
    )
    assert any(record["kind"] == "designer" for record in records(tmp_path / "learned"))
    assert_identical(weights(fixed), weights(learned))


class PoisonedFeedback(Channels):
    """The same problem with other labels: `poison` is called on each."""

    def __init__(self, poison):
        super().__init__()
        self.poison = poison

    def feedback_batches(self, seed):
        return ((x, self.poison(y)) for x, y in super().feedback_batches(seed))


@pytest.mark.parametrize(
    "poison",
    [lambda y: y * float("nan"), lambda y: y.flip(0), lambda y: 100 * y],
    ids=["nan", "permuted", "scaled"],
)
def test_labels_reach_the_learner_only_through_the_designer(tmp_path, poison):
    """With phi frozen (lr 0, updates still made) no label changes a bit of theta."""
    frozen = lambda p: adam(p, lr=0.0)
    clean = train(tmp_path / "clean", strategy=Learned(OneStep(), frozen, every=2))
    torch.manual_seed(0)
    strategy = Learned(OneStep(), frozen, every=2)
    poisoned = train(tmp_path / "poisoned", PoisonedFeedback(poison), strategy, max_failures=100)
    assert_identical(weights(clean), weights(poisoned))


def test_labels_do_reach_the_learner_through_the_designer(tmp_path):
    """The test above can fail: with phi trained, other labels make another learner."""
    clean = train(tmp_path / "clean", strategy=Learned(OneStep(), adam, every=2))
    torch.manual_seed(0)
    other = train(
        tmp_path / "other",
        PoisonedFeedback(lambda y: y.flip(0)),
        Learned(OneStep(), adam, every=2),
    )
    assert not torch.equal(clean.problem.learner[0].weight, other.problem.learner[0].weight)


def test_non_finite_feedback_is_skipped_counted_and_logged(tmp_path):
    torch.manual_seed(0)
    trainer = train(
        tmp_path,
        PoisonedFeedback(lambda y: y * float("nan")),
        Learned(OneStep(), adam, every=8),
    )
    assert trainer.strategy.num_skipped == 3
    assert [r["skipped_updates"] for r in records(tmp_path) if r["kind"] == "designer"] == [
        1.0,
        2.0,
        3.0,
    ]
    assert torch.equal(trainer.problem.designer.logits, torch.zeros(16))


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_same_seed_same_numbers_other_seed_other_numbers(tmp_path, estimator):
    a, b, c = (
        train(tmp_path / str(i), strategy=Learned(estimator, adam, every=2), seed=seed)
        for i, seed in enumerate((0, 0, 1))
    )
    assert_identical(weights(a), weights(b))
    assert records(tmp_path / "0") == records(tmp_path / "1")
    assert not torch.equal(a.problem.learner[0].weight, c.problem.learner[0].weight)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 7, 13, 23])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, estimator, stop_at):
    whole = train(
        tmp_path / "whole", strategy=Learned(estimator, adam, every=2), checkpoint_every=1
    )

    class Stopping(Learned):
        def next_task(self, state):
            if state.budget.steps == stop_at:
                raise Interrupted
            return super().next_task(state)

    with pytest.raises(Interrupted):
        train(tmp_path / "parts", strategy=Stopping(estimator, adam, every=2), checkpoint_every=1)
    resumed = train(
        tmp_path / "parts",
        strategy=Learned(estimator, adam, every=2),
        resume=True,
        checkpoint_every=1,
    )
    assert_identical(weights(whole), weights(resumed))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_the_designer_finds_the_channels_that_feedback_needs(tmp_path):
    """A problem with a known answer: 4 of 16 channels matter and 4 fit through the bottleneck."""
    fixed = train(tmp_path / "fixed", steps=300).problem
    learned = train(
        tmp_path / "learned", strategy=Learned(OneStep(Cosine()), adam, every=4), steps=300
    ).problem
    assert fixed.evaluate()["useful_mse"] > 0.5
    assert learned.evaluate()["useful_mse"] < 0.01
    assert learned.designer.logits.argsort(descending=True)[:4].sort().values.tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_step_0_is_measured_before_anything_is_trained(tmp_path):
    torch.manual_seed(0)
    expected = Channels().evaluate()
    train(tmp_path)
    probes = [record for record in records(tmp_path) if record["kind"] == "probe"]
    assert [probe["step"] for probe in probes] == [0, 8, 16, 24]
    assert probes[0]["metrics"] == expected


def test_probe_records_hold_the_directions_that_the_problem_states(tmp_path):
    train(tmp_path, steps=8)
    probes = [record for record in records(tmp_path) if record["kind"] == "probe"]
    assert [probe["directions"] for probe in probes] == [{"useful_mse": "lower"}] * len(probes)
    problem = Channels()
    problem.metric_directions = {"useful_mse": "down"}
    with pytest.raises(MetaVPTError, match=r"^metric_directions\.useful_mse=down: write lower or"):
        train(tmp_path / "wrong", problem)


def test_only_the_step_writes_gradients_of_the_learner(tmp_path):
    """Designing a task leaves every .grad of theta as it was."""
    torch.manual_seed(0)
    problem = Channels()
    strategy = Learned(OneStep(), adam, every=1)
    trainer = Trainer(problem, strategy, Budget(steps=2), RunLog(tmp_path))
    trainer.strategy.next_task(trainer.state)
    assert all(p.grad is None for p in problem.learner.parameters())


def test_the_budget_counts_steps_samples_and_gradient_evaluations(tmp_path):
    budget = train(tmp_path, strategy=Learned(OneStep(), adam, every=4), steps=8).budget
    assert (budget.steps, budget.samples) == (8, 8 * 64)
    # In steps 0 and 4 a g_down and the two losses of a difference product. The designer weighs
    # the errors, so the way back to it does not pass the learner.
    # Before the learner's first step one pass more measures the norm of its gradient.
    assert budget.grad_evals == pytest.approx(8 + 2 * (1 + 2 / 3) + 1, rel=1e-12)
    assert set(budget.times) >= {"data", "task", "designer", "learner", "probe"}
    assert budget.seconds == pytest.approx(
        sum(t for name, t in budget.times.items() if name != "probe")
    )


class Exploding(Channels):
    """The pretraining loss is NaN in the steps `bad`."""

    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls = bad, 0

    def pretrain_loss(self, theta, task):
        self.calls += 1
        return super().pretrain_loss(theta, task) * (
            float("nan") if self.calls in self.bad else 1.0
        )


def test_a_step_that_is_not_finite_is_skipped(tmp_path):
    torch.manual_seed(0)
    trainer = train(tmp_path, Exploding({3}), steps=5)
    warnings = [record for record in records(tmp_path) if record["kind"] == "warning"]
    assert len(warnings) == 1
    assert "step skipped" in warnings[0]["message"]
    assert all(torch.isfinite(p).all() for p in trainer.problem.learner.parameters())


def test_failures_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        train(tmp_path, Exploding(set(range(2, 100))), max_failures=3)


def test_head_warm_up_trains_the_named_parameters_only(tmp_path):
    class Warm(Channels):
        def warm_up_parameters(self):
            return ["1.weight", "1.bias"]

    problem = Warm()
    before = {name: p.clone() for name, p in problem.learner.state_dict().items()}
    after = train(tmp_path, problem, steps=5, head_warmup_steps=5).problem.learner.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1.weight", "1.bias"}


def test_vectors_do_not_decay(tmp_path):
    trainer = train(tmp_path, weight_decay=0.1)
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.ndim >= 2 else 0.0)


def test_a_designer_without_parameters_is_refused(tmp_path):
    problem = Channels()
    problem.designer = nn.Identity()
    with pytest.raises(MetaVPTError, match="Identity has no trainable parameter"):
        train(tmp_path, problem, Learned(OneStep()))


@pytest.mark.parametrize(("names", "words"), [([], "is empty"), (["body.weight"], "'body.weight'")])
def test_aligned_parameters_that_match_nothing_are_refused(tmp_path, names, words):
    problem = Channels()
    problem.aligned_parameters = lambda: names
    with pytest.raises(MetaVPTError, match=words):
        train(tmp_path, problem, Learned(OneStep(), adam))


def test_bad_schedules_of_the_designer_are_named():
    with pytest.raises(MetaVPTError, match="every=0"):
        Learned(every=0)
