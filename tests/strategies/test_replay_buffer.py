"""Designers fitted to a replay buffer, on a minimal designer: targets phi x, values A."""

import pytest
import torch
from torch import nn

from metavpt import MetaVPTError, NonFiniteError
from metavpt.strategies.replay_buffer import ReplayBuffer

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
A = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Taught:
    """The part of a problem that a replay buffer needs."""

    def __init__(self):
        self.designer = nn.Linear(4, 3, bias=False).double()
        nn.init.zeros_(self.designer.weight)
        self.seen = []

    def designer_loss(self, replay):
        self.seen.append(replay["x"])
        y = self.designer(replay["x"])
        return -(y * replay["values"]).mean() + y.square().mean() / 2


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def buffer(problem, *options, **named):
    made = ReplayBuffer(sgd, *options, max_norm=1e9, **named)
    made.start(problem, "strategy")
    return made


def entry(rows=slice(None)):
    return {"x": X[rows], "values": A[rows]}


def test_many_steps_on_one_lesson_end_at_the_regression_of_values_on_what_the_designer_reads():
    """-<y, A> + |y|^2 / 2 is least at E[A | x], here linear in x: the normal equations."""
    problem = Taught()
    buffer(problem, 3000).fit(problem, problem.designer_loss, entry())
    torch.testing.assert_close(
        problem.designer.weight.detach().T, torch.linalg.lstsq(X, A).solution, rtol=1e-9, atol=1e-9
    )


def test_lessons_are_taken_newest_first_and_as_many_as_asked_for_are_replayed():
    problem = Taught()
    made = buffer(problem, 4, 2)
    for k in range(3):
        made.fit(problem, problem.designer_loss, entry(slice(4 * k, 4 * k + 4)))
    first, second, third = X.split(4)
    expected = [*[first] * 4, *[second, first] * 2, *[third, second] * 2]
    assert all(torch.equal(seen, x) for seen, x in zip(problem.seen, expected, strict=True))
    assert len(made.entries) == 1


def test_the_record_is_of_the_first_step_and_a_lesson_that_is_not_finite_is_counted_and_forgotten():
    problem = Taught()
    made = buffer(problem, 2, 3)
    assert made.fit(problem, problem.designer_loss, entry()) == {"designer_loss": 0.0}
    expected = -float(problem.designer_loss(entry()).detach())
    assert made.fit(problem, problem.designer_loss, entry()) == {
        "designer_loss": pytest.approx(-expected)
    }
    held, before = len(made.entries), problem.designer.weight.detach().clone()
    assert made.fit(problem, problem.designer_loss, {"x": X, "values": A / 0}) == {
        "skipped_updates": 1.0
    }
    assert len(made.entries) == held
    assert torch.equal(problem.designer.weight, before)


def test_rows_are_drawn_anew_for_each_step_and_a_resumed_run_draws_the_same():
    whole, parts = Taught(), Taught()
    made, killed = buffer(whole, 5, batch_size=3), buffer(parts, 5, batch_size=3)
    for made_by, problem in ((made, whole), (killed, parts)):
        made_by.fit(problem, problem.designer_loss, entry())
    assert {tuple(seen.shape) for seen in whole.seen} == {(3, 4)}
    assert len({seen.sum().item() for seen in whole.seen}) > 1
    assert not made.entries  # replay 1: nothing to keep
    resumed = buffer(parts, 5, batch_size=3, seed=9)
    resumed.load_state_dict(killed.state_dict())
    made.fit(whole, whole.designer_loss, entry())
    resumed.fit(parts, parts.designer_loss, entry())
    assert torch.equal(whole.designer.weight, parts.designer.weight)


@pytest.mark.parametrize("anneal", [False, True])
def test_the_learning_rate_falls_along_half_a_cosine_within_each_lesson_where_it_is_asked_to(
    anneal,
):
    """And is as high as ever when the next one begins, in a resumed run too."""
    problem, weight = Taught(), torch.zeros(3, 4, dtype=torch.float64)
    made = buffer(problem, 4, anneal=anneal)
    for x in X.split(6):
        a = A[: len(x)]
        made.fit(problem, problem.designer_loss, {"x": x, "values": a})
        killed, made = made, buffer(problem, 4, anneal=anneal)
        made.load_state_dict(killed.state_dict())
        for factor in (1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4) if anneal else [1.0] * 4:
            weight = weight - factor * 0.5 * (weight @ x.T - a.T) @ x / a.numel()
    torch.testing.assert_close(problem.designer.weight.detach(), weight, rtol=1e-12, atol=1e-14)


def test_a_lesson_that_breaks_off_leaves_the_learning_rate_of_the_next_one_alone():
    class Breaks(Taught):
        def designer_loss(self, replay):
            if len(self.seen) == 3:
                self.seen.clear()
                raise NonFiniteError("in its last step")
            return super().designer_loss(replay)

    problem, fresh = Breaks(), Taught()
    made = buffer(problem, 4, anneal=True)
    with pytest.raises(NonFiniteError):
        made.fit(problem, problem.designer_loss, entry())
    fresh.designer.load_state_dict(problem.designer.state_dict())
    made.phi_steps = 3
    made.fit(problem, problem.designer_loss, entry())
    buffer(fresh, 3, anneal=True).fit(fresh, fresh.designer_loss, entry())
    assert torch.equal(problem.designer.weight, fresh.designer.weight)


def test_the_gradient_is_clipped():
    problem = Taught()
    made = ReplayBuffer(sgd, 1, max_norm=1e-3)
    made.start(problem, "strategy")
    made.fit(problem, problem.designer_loss, entry())
    assert float(problem.designer.weight.detach().norm()) == pytest.approx(0.5e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "named"),
    [((0,), "phi_steps"), ((1, 0), "replay"), ((1, 1, 1.0, 0), "batch_size")],
)
def test_settings_that_make_no_sense_are_named(options, named):
    with pytest.raises(MetaVPTError, match=named):
        ReplayBuffer(sgd, *options)


def test_a_designer_without_parameters_is_an_error():
    problem = Taught()
    problem.designer = nn.Identity()
    with pytest.raises(MetaVPTError, match="Identity has no trainable parameter"):
        ReplayBuffer(sgd, 1).start(problem, "strategy")
