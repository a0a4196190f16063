import torch
from torch import nn

from metavpt.hypergradients import params

X = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]])}
Y = {"a": torch.tensor([10.0, 20.0]), "b": torch.tensor([[30.0]])}


def test_named_gives_the_live_trainable_parameters() -> None:
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    found = params.named(module)
    assert list(found) == ["weight"]
    assert found["weight"] is module.weight


def test_leaves_ask_for_a_gradient_and_share_memory() -> None:
    leaves = params.leaves(X)
    assert all(p.is_leaf and p.requires_grad for p in leaves.values())
    assert leaves["a"].data_ptr() == X["a"].data_ptr()
    assert params.clone(X)["a"].data_ptr() != X["a"].data_ptr()
    assert not params.detach(leaves)["a"].requires_grad


def test_subset_takes_the_prefix_off() -> None:
    assert list(params.subset({"head.w": X["a"], "trunk.w": X["b"]}, "head.")) == ["w"]


def test_arithmetic_is_that_of_one_vector() -> None:
    total = params.add(X, params.scale(Y, 2.0), alpha=0.5)
    torch.testing.assert_close(total, {"a": X["a"] + Y["a"], "b": X["b"] + Y["b"]})
    assert float(params.dot(X, Y)) == 10 + 40 + 90
    torch.testing.assert_close(params.norm(X), torch.tensor(14.0).sqrt())
    assert float(params.norm(params.zeros_like(X))) == 0.0


def test_is_finite_sees_any_entry() -> None:
    assert params.is_finite(X)
    for bad in (float("nan"), float("inf")):
        assert not params.is_finite({**X, "b": torch.tensor([[bad]])})
