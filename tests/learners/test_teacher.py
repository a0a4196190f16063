import copy

import pytest
import torch
from torch import nn

from metavpt.errors import MetaVPTError
from metavpt.learners.teacher import Teacher


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).double()
        self.register_buffer("scale", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_update_is_the_moving_average() -> None:
    student = Student()
    teacher = Teacher(student)
    before = teacher.learner.linear.weight.clone()
    with torch.no_grad():
        student.linear.weight += 1.0
        student.scale.fill_(3.0)
    teacher.update(student, 0.75)
    torch.testing.assert_close(
        teacher.learner.linear.weight,
        0.75 * before + 0.25 * student.linear.weight.detach(),
        atol=1e-14,
        rtol=0,
    )
    assert teacher.learner.scale.item() == 3.0
    unchanged = teacher.learner.linear.weight.clone()
    teacher.update(student, 1.0)
    assert torch.equal(teacher.learner.linear.weight, unchanged)
    teacher.update(student, 0.0)
    assert torch.equal(teacher.learner.linear.weight, student.linear.weight)


def test_teacher_is_frozen_but_passes_gradients_to_its_inputs() -> None:
    student = Student()
    teacher = Teacher(student).train()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    teacher(x).sum().backward()
    assert not teacher.training
    assert not teacher.learner.training
    assert x.grad is not None
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_another_model_is_refused() -> None:
    with pytest.raises(MetaVPTError, match=r"linear\.bias is in only one"):
        Teacher(Student()).update(nn.Sequential(), 0.9)


def test_the_answer_is_kept_for_the_same_input_until_teacher_or_input_change() -> None:
    student = Student()
    teacher, x = Teacher(student), torch.randn(4, 3, dtype=torch.float64)
    asked: list[None] = []
    teacher.learner.register_forward_hook(lambda *_: asked.append(None))

    def answer(x: torch.Tensor) -> torch.Tensor:
        asked.clear()
        return teacher.once([x], lambda: {"y": teacher(x)})["y"]

    def same(x: torch.Tensor) -> bool:
        """Whether the answer is right, and was known."""
        assert torch.equal(answer(x), student.linear(x).detach())
        return not asked

    assert not same(x)
    assert same(x)
    assert same(x.detach())
    assert not same(x.clone())
    assert not same(x[:2])
    assert not same(x)
    x += 1
    assert not same(x)
    with torch.no_grad():
        student.linear.weight += 1
    teacher.update(student, 0.0)
    assert not same(x)
    assert same(x)
    teacher.load_state_dict(teacher.state_dict())
    assert not same(x)
    assert copy.deepcopy(teacher)._known == []


def test_an_answer_with_a_graph_is_computed_and_kept_without() -> None:
    teacher = Teacher(Student())
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    ask = lambda x: teacher.once([x], lambda: teacher(x))
    for _ in range(2):
        (gradient,) = torch.autograd.grad(ask(x).sum(), x)
        assert float(gradient.abs().sum()) > 0
    known = ask(x.detach())
    assert not known.requires_grad
    with torch.no_grad():
        assert ask(x) is known


def test_several_answers_are_kept_by_the_values_of_their_inputs_inside_a_block() -> None:
    student = Student()
    teacher, asked = Teacher(student), []
    teacher.learner.register_forward_hook(lambda *_: asked.append(None))
    old, older, oldest = inputs = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]

    def known(x: torch.Tensor) -> bool:
        """Whether the answer is right, and was known."""
        asked.clear()
        assert torch.equal(teacher.once([x], lambda: teacher(x)), student.linear(x).detach())
        return not asked

    with teacher.keep(2):
        assert not any(known(x) for x in reversed(inputs))
        assert known(old.clone())
        assert known(older.clone())
        assert not known(oldest.clone())  # in the place of the one that was asked longest ago
        assert known(older.clone())
        assert not known(old.clone())
        assert not known(old + 1e-12)
        assert not known(old[:2])
        written = old.clone()
        known(written)
        written += 1
        assert not known(old.clone())  # what it was asked about is gone
        last = older.clone()
        known(last)
    assert known(last)  # the newest, by its memory
    assert not known(last.clone())
