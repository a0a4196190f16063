"""Predicted against realised change of the feedback loss, on the README's problem."""

import pytest
import torch
from channels import Channels

from metavpt import Budget, Fixed, RunLog, Trainer
from metavpt.hypergradients import params
from metavpt.hypergradients.mixed_products import value_and_gradient
from metavpt.training.first_order import FirstOrderProbe


class Headed(Channels):
    """The same with a head: fit_heads moves it towards the channels of a labelled batch."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 4)

    def heads(self):
        return ["head"]

    def fit_heads(self):
        with torch.no_grad():
            self.head.weight += 0.1

    def feedback_loss(self, theta, batch):
        x, y = batch
        return (
            (self.head(torch.func.functional_call(self.learner, theta, (x,))[:, :4]) - y) ** 2
        ).mean()


def one_step(problem, optimizer, probe):
    """The records of one ordinary step on the next batch, with what the step really was."""
    theta = params.named(problem.learner)
    batch = next(iter(problem.pretrain_batches(7)))
    problem.pretrain_loss(theta, problem.designer(batch)).backward()
    before = probe.before(optimizer)
    start = params.clone(theta)
    gradients = {name: p.grad.clone() for name, p in theta.items()}
    optimizer.step()
    return probe.after(before), before, start, gradients


@pytest.fixture
def problem():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield Channels()
    torch.set_default_dtype(torch.float32)


def test_sgd_by_hand(problem):
    optimizer = torch.optim.SGD(problem.learner.parameters(), lr=1e-4)
    record, _, start, gradients = one_step(problem, optimizer, FirstOrderProbe(problem, seed=3))
    labelled, held_out = (
        next(iter(problem.feedback_batches(3))),
        next(iter(problem.feedback_batches(100_003))),
    )
    theta = params.leaves(start)
    loss = problem.feedback_loss(theta, labelled)
    g_down = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
    plain = -1e-4 * float(params.dot(g_down, gradients))
    after = params.named(problem.learner)
    assert record["predicted_plain"] == pytest.approx(plain, rel=1e-12)
    assert record["predicted"] == pytest.approx(
        plain, rel=1e-8
    )  # plain SGD: the step is -lr g_pre, and all parameters are aligned
    assert record["predicted_aligned"] == record["predicted"]
    for name, batch in {"realised": held_out, "realised_same": labelled}.items():
        change = (
            problem.feedback_loss(after, batch).item() - problem.feedback_loss(start, batch).item()
        )
        assert record[name] == pytest.approx(change, abs=1e-14)


def test_the_prediction_becomes_exact_as_the_step_becomes_short(problem):
    errors = []
    for lr in (1e-3, 1e-4):
        torch.manual_seed(0)
        problem = Channels()
        optimizer = torch.optim.AdamW(problem.learner.parameters(), lr=lr)
        record, *_ = one_step(problem, optimizer, FirstOrderProbe(problem, seed=3))
        errors.append(abs(record["realised_same"] - record["predicted"]) / lr)
    assert errors[1] < 0.2 * errors[0]


def test_only_aligned_parameters_count_where_they_are_fewer(problem):
    problem.aligned_parameters = lambda: ["1.weight"]
    optimizer = torch.optim.AdamW(problem.learner.parameters(), lr=1e-3)
    record, before, start, _ = one_step(problem, optimizer, FirstOrderProbe(problem, seed=3))
    change = problem.learner[1].weight.detach() - start["1.weight"]
    assert record["predicted_aligned"] == pytest.approx(
        float((before.g_down["1.weight"] * change).sum()), rel=1e-12
    )
    assert record["predicted_aligned"] != record["predicted"]


def test_heads_are_fitted_for_the_probe_alone_and_remembered_by_it():
    torch.manual_seed(0)
    problem = Headed()
    optimizer = torch.optim.SGD(problem.learner.parameters(), lr=1e-3)
    theirs = problem.head.weight.clone()
    probe = FirstOrderProbe(problem, seed=3)
    for _ in range(2):
        one_step(problem, optimizer, probe)
        assert torch.equal(problem.head.weight, theirs)
    assert torch.allclose(probe.state_dict()["heads"]["head"]["weight"], theirs + 0.2)


@pytest.mark.parametrize("clip_norm", [1e-2, 1e6], ids=["active", "inactive"])
def test_the_plain_prediction_is_that_of_the_gradient_before_it_is_clipped(
    problem, tmp_path, clip_norm
):
    """Through the trainer's own step; the real change is the clipped one."""
    trainer = Trainer(
        problem,
        Fixed(),
        Budget(steps=50),
        RunLog(tmp_path),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3),
        weight_decay=0.0,
        clip_norm=clip_norm,
        first_order_every=1,
    )
    start = params.clone(params.named(problem.learner))
    trainer.step()
    (record,) = (r for r in trainer.log.records() if r["kind"] == "first_order")
    change = params.add(params.detach(params.named(problem.learner)), start, alpha=-1)
    labelled = next(iter(problem.feedback_batches(800_000)))
    g_down = value_and_gradient(lambda theta: problem.feedback_loss(theta, labelled), start)[1]
    task = problem.recipe(next(iter(problem.pretrain_batches(0))))
    g_pre = value_and_gradient(lambda theta: problem.pretrain_loss(theta, task), start)[1]
    assert (float(params.norm(g_pre)) > clip_norm) == (clip_norm < 1)
    assert record["predicted"] == pytest.approx(float(params.dot(g_down, change)), rel=1e-9)
    assert record["predicted_plain"] == pytest.approx(
        -1e-3 * float(params.dot(g_down, g_pre)), rel=1e-6
    )
