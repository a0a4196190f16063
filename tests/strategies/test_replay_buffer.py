"""Designers fitted to lessons, on a designer small enough to write its steps out: targets are phi x, values A."""

import pytest
import torch
from torch import nn

from metavpt import MetaVPTError, NonFiniteError
from metavpt.strategies.replay_buffer import Lessons

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
A = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Taught:
    """As much of a problem as lessons need."""

    def __init__(self):
        self.designer = nn.Linear(4, 3, bias=False).double()
        nn.init.zeros_(self.designer.weight)
        self.seen = []

    def taught(self, lesson):
        self.seen.append(lesson["x"])
        y = self.designer(lesson["x"])
        return -(y * lesson["values"]).mean() + y.square().mean() / 2


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def lessons(problem, *options, **named):
    made = Lessons(sgd, *options, max_norm=1e9, **named)
    made.start(problem)
    return made


def lesson(rows=slice(None)):
    return {"x": X[rows], "values": A[rows]}


def test_many_steps_on_one_lesson_end_at_the_regression_of_values_on_what_the_designer_reads():
    """-<y, A> + |y|^2 / 2 is least at E[A | x], here within linear functions: the normal equations, to 1e-9."""
    problem = Taught()
    lessons(problem, 3000).learn(problem, lesson())
    torch.testing.assert_close(
        problem.designer.weight.detach().T, torch.linalg.lstsq(X, A).solution, rtol=1e-9, atol=1e-9
    )


def test_lessons_are_taken_newest_first_and_as_many_as_asked_for_are_replayed():
    problem = Taught()
    made = lessons(problem, 4, 2)
    for k in range(3):
        made.learn(problem, lesson(slice(4 * k, 4 * k + 4)))
    first, second, third = X.split(4)
    expected = [*[first] * 4, *[second, first] * 2, *[third, second] * 2]
    assert all(torch.equal(seen, x) for seen, x in zip(problem.seen, expected, strict=True))
    assert len(made.held) == 1


def test_the_record_is_of_the_first_step_and_a_lesson_that_is_not_finite_is_counted_and_forgotten():
    problem = Taught()
    made = lessons(problem, 2, 3)
    assert made.learn(problem, lesson()) == {"value": 0.0}
    expected = -float(problem.taught(lesson()).detach())
    assert made.learn(problem, lesson()) == {"value": pytest.approx(expected)}
    held, before = len(made.held), problem.designer.weight.detach().clone()
    assert made.learn(problem, {"x": X, "values": A / 0}) == {"skipped_updates": 1.0}
    assert len(made.held) == held
    assert torch.equal(problem.designer.weight, before)


def test_rows_are_drawn_anew_for_each_step_and_a_resumed_run_draws_the_same():
    whole, parts = Taught(), Taught()
    made, killed = lessons(whole, 5, batch_size=3), lessons(parts, 5, batch_size=3)
    for made_by, problem in ((made, whole), (killed, parts)):
        made_by.learn(problem, lesson())
    assert {tuple(seen.shape) for seen in whole.seen} == {(3, 4)}
    assert len({seen.sum().item() for seen in whole.seen}) > 1
    assert not made.held  # replay 1: nothing to keep
    resumed = lessons(parts, 5, batch_size=3, seed=9)
    resumed.load_state_dict(killed.state_dict())
    made.learn(whole, lesson())
    resumed.learn(parts, lesson())
    assert torch.equal(whole.designer.weight, parts.designer.weight)


@pytest.mark.parametrize("anneal", [False, True])
def test_the_learning_rate_falls_along_half_a_cosine_within_each_lesson_where_it_is_asked_to(
    anneal,
):
    """And is as high as ever when the next one begins, in a resumed run too."""
    problem, weight = Taught(), torch.zeros(3, 4, dtype=torch.float64)
    made = lessons(problem, 4, anneal=anneal)
    for x in X.split(6):
        a = A[: len(x)]
        made.learn(problem, {"x": x, "values": a})
        killed, made = made, lessons(problem, 4, anneal=anneal)
        made.load_state_dict(killed.state_dict())
        for factor in (1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4) if anneal else [1.0] * 4:
            weight = weight - factor * 0.5 * (weight @ x.T - a.T) @ x / a.numel()
    torch.testing.assert_close(problem.designer.weight.detach(), weight, rtol=1e-12, atol=1e-14)


def test_a_lesson_that_breaks_off_leaves_the_learning_rate_of_the_next_one_alone():
    class Breaks(Taught):
        def taught(self, lesson):
            if len(self.seen) == 3:
                self.seen.clear()
                raise NonFiniteError("in its last step")
            return super().taught(lesson)

    problem, fresh = Breaks(), Taught()
    made = lessons(problem, 4, anneal=True)
    with pytest.raises(NonFiniteError):
        made.learn(problem, lesson())
    fresh.designer.load_state_dict(problem.designer.state_dict())
    made.phi_steps = 3
    made.learn(problem, lesson())
    lessons(fresh, 3, anneal=True).learn(fresh, lesson())
    assert torch.equal(problem.designer.weight, fresh.designer.weight)


def test_the_gradient_is_clipped():
    problem = Taught()
    made = Lessons(sgd, 1, max_norm=1e-3)
    made.start(problem)
    made.learn(problem, lesson())
    assert float(problem.designer.weight.detach().norm()) == pytest.approx(0.5e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "named"),
    [((0,), "phi_steps"), ((1, 0), "replay"), ((1, 1, 1.0, 0), "lesson_batch_size")],
)
def test_settings_that_make_no_sense_are_named(options, named):
    with pytest.raises(MetaVPTError, match=named):
        Lessons(sgd, *options)


def test_a_designer_without_parameters_is_an_error():
    problem = Taught()
    problem.designer = nn.Identity()
    with pytest.raises(MetaVPTError, match="Identity has no trainable parameter"):
        Lessons(sgd, 1).start(problem)
