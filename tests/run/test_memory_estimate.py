"""What is counted on the meta device is what the same computation keeps for real."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metavpt.learners.vit import create_backbone
from metavpt.run import memory_estimate

TINY: dict[str, Any] = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 4,
    "patch_size": 8,
    "img_size": 64,
}


def total(features: Any) -> Tensor:
    return features.cls.square().sum() + features.patches.square().sum()


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch14_dinov2"])
def test_saved_bytes_on_meta_are_those_of_fused_attention_on_the_cpu(name: str) -> None:
    real = create_backbone(name, 1, **TINY)
    with torch.device("meta"):
        planned = create_backbone(name, 1, **TINY)
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total(real(torch.randn(2, 3, 64, 64)))
    with torch.device("meta"):
        counted = memory_estimate.saved_bytes(
            lambda: total(planned(torch.empty(2, 3, 64, 64))), planned.parameters()
        )
    expected = sum(storage.nbytes() for storage in held.values())
    assert counted == pytest.approx(
        expected, rel=0.01
    )  # torch saves a few numbers for the random state of attention


def test_saved_bytes_of_a_known_graph() -> None:
    """exp keeps its result, a linear layer its input; a weight is in memory anyway."""
    with torch.device("meta"):
        layer = nn.Linear(8, 3, bias=False)
        x = torch.empty(5, 8, requires_grad=True)
        assert memory_estimate.saved_bytes(lambda: layer(x.exp()), layer.parameters()) == 4 * 5 * 8
        assert memory_estimate.saved_bytes(lambda: layer(x.exp()), []) == 4 * (5 * 8 + 8 * 3)


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (torch.optim.AdamW, 2),
        (torch.optim.SGD, 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
    ],
)
def test_state_bytes(optimizer: Any, copies: int) -> None:
    layer = nn.Linear(100, 100, bias=False, device="meta")
    made = optimizer(layer.parameters())
    assert memory_estimate.state_bytes(made) == pytest.approx(copies * 40000, abs=8)
    assert layer.weight.grad is None
