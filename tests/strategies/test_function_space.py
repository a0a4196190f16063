"""The hypergradient in function space: features theta x, targets x W + phi x."""

from functools import partial

import pytest
import torch
from helpers import regression
from helpers.regression import Regression, X, Y, assert_resumes, last_drawn, sgd
from torch.func import functional_call

from metavpt import (
    ConjugateGradient,
    ExactProduct,
    Fixed,
    Implicit,
    NonFiniteError,
)
from metavpt.strategies.function_space import Functional, permuted


class Functions(Regression):
    """`Regression`, of whose outputs the feedback is asked as they are."""

    def output_values(self, theta, batch):
        outputs = (X[batch] @ theta["weight"]).requires_grad_()
        with torch.enable_grad():
            loss = (outputs - Y[batch]).square().sum() / 2
        return {"rows": batch, "values": -torch.autograd.grad(loss, outputs)[0]}


trainer_of = partial(regression.trainer_of, problem=Functions)


def functional(lr=0.5, **options):
    return Functional(
        sgd(lr),
        **{"phi_steps": 5, "batch_size": 4, "every": 2, "max_norm": 1e9, **options},
    )


def test_it_is_implicit_differentiation_where_the_learner_can_tell_any_targets():
    """Outputs f regress on t_phi: Implicit = -d<values, t_phi>/dphi with values = -dL_down/df."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()
    phi = {name: p.detach() for name, p in network.named_parameters()}

    def targets(phi):
        return functional_call(network, phi, (X,))

    def outer(theta):
        return ((theta["f"].sin() - Y) ** 2).mean() + theta["f"].prod(dim=1).square().mean()

    solution = {"f": targets(phi)}
    implicit = Implicit(ConjugateGradient(), damping=0.0, product=ExactProduct())
    found = implicit(
        [lambda phi: lambda theta: (theta["f"] - targets(phi)).square().sum() / 2],
        outer,
        solution,
        phi,
    )

    f = solution["f"].clone().requires_grad_()
    values = -torch.autograd.grad(outer({"f": f}), f)[0]
    leaves = {name: p.clone().requires_grad_() for name, p in phi.items()}
    expected = torch.autograd.grad(-(values * targets(leaves)).sum(), list(leaves.values()))
    for g, e in zip(found.by_phi.values(), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-13)


def test_the_steps_of_phi_are_gradient_steps_on_rows_of_the_labelled_batch(tmp_path):
    trainer = trainer_of(tmp_path, functional())
    phi, generator = torch.zeros(6, 3, dtype=torch.float64), torch.Generator().manual_seed(0)
    for step in range(6):
        theta = trainer.problem.learner.weight.detach().clone()
        trainer.step()
        if step % 2 == 0:
            labelled = last_drawn(trainer.streams.feedback)
            a = Y[labelled] - X[labelled] @ theta
            for _ in range(5):
                rows = torch.randint(len(labelled), (4,), generator=generator)
                x = X[labelled][rows]
                phi = phi - 0.5 * x.T @ (x @ phi - a[rows]) / a[rows].numel()
        torch.testing.assert_close(
            trainer.problem.designer.weight.detach(), phi, rtol=1e-9, atol=1e-12
        )
    assert phi.norm() > 0


def test_with_lr_0_it_is_fixed_bit_for_bit(tmp_path):
    fixed, still = (
        trainer_of(tmp_path / "fixed", Fixed()),
        trainer_of(tmp_path / "still", functional(lr=0.0)),
    )
    fixed.run()
    still.run()
    assert torch.equal(fixed.problem.learner.weight, still.problem.learner.weight)


@pytest.mark.parametrize("permute", [False, True])
def test_resumes_bit_for_bit_and_differs_from_fixed(tmp_path, permute):
    assert_resumes(trainer_of, lambda: functional(permute=permute), tmp_path)


def test_labels_reach_the_learner_through_phi_alone(tmp_path):
    """Non-finite replay targets change only the count, and so does a non-finite feedback loss."""

    def broken(*_):
        raise NonFiniteError("the feedback loss is not finite")

    fixed = trainer_of(tmp_path / "fixed", Fixed())
    fixed.run()
    nan = {"rows": torch.arange(2), "values": torch.full((2, 3), torch.nan, dtype=torch.float64)}
    for name, bad in {"values": lambda *_: nan, "loss": broken}.items():
        trainer = trainer_of(tmp_path / name, functional())
        trainer.problem.output_values = bad
        trainer.run()
        assert trainer.strategy.num_skipped + trainer.strategy.buffer.num_skipped == 6
        assert torch.equal(fixed.problem.learner.weight, trainer.problem.learner.weight)


def test_true_values_teach_what_those_of_other_samples_do_not(tmp_path):
    """The loss of the feedback after 60 steps, where pretraining alone leads elsewhere."""
    losses = {}
    for name, strategy in {
        "fixed": Fixed(),
        "true": functional(),
        "random": functional(permute=True),
    }.items():
        trainer = trainer_of(tmp_path / name, strategy, steps=60)
        trainer.run()
        losses[name] = trainer.metrics["loss"]
    assert losses["true"] < 0.8 * min(losses["fixed"], losses["random"])


def test_a_replay_batch_is_read_at_its_steps_alone(tmp_path):
    trainer = trainer_of(tmp_path, functional(every=4, burn_in=1), steps=9)
    trainer.run()
    assert trainer.streams.feedback.state_dict()["position"] == 2  # before the steps after 4 and 8


def test_random_values_are_those_of_other_samples_with_signs_of_their_own():
    values = torch.arange(1.0, 41.0).view(20, 2)
    replay = {"rows": torch.arange(20), "values": values}
    seen = permuted(replay, torch.Generator().manual_seed(0))
    assert torch.equal(seen["rows"], torch.arange(20))
    assert torch.equal(seen["values"].abs().sort(dim=0).values, values)
    assert not torch.equal(seen["values"].abs(), values)
    signs = seen["values"].sign()
    assert torch.equal(signs[:, 0], signs[:, 1])  # of a sample as a whole
    assert set(signs[:, 0].tolist()) == {-1.0, 1.0}
