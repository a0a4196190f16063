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
