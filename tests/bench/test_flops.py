"""FLOPs against the textbook: 2 n m k for a product of matrices."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from metavpt.bench import flops


def test_a_product_and_its_backward_pass():
    x, w = torch.zeros(5, 3), torch.zeros(3, 7, requires_grad=True)
    assert flops.count(lambda: x @ w) == 2 * 5 * 3 * 7
    assert flops.count(lambda: (x @ w).sum().backward()) == 2 * (2 * 5 * 3 * 7)


def test_attention_is_counted_on_a_cpu_too():
    """Two products of T x T x D for each head; backwards five, one of them again."""
    heads = [torch.zeros(2, 3, 16, 8, requires_grad=True) for _ in range(3)]
    one = 2 * 2 * 3 * 16 * 16 * 8
    assert flops.count(lambda: scaled_dot_product_attention(*heads)) == 2 * one
    assert flops.count(lambda: scaled_dot_product_attention(*heads).sum().backward()) == 7 * one


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("Voodoo 2", None),
        (None, None),
    ],
)
def test_a_card_is_known_by_its_name(card, peak):
    assert flops.peak_of(card) == peak
    assert flops.utilisation(1e12, 0.5, card) == (2e12 / peak if peak else None)
