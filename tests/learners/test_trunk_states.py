"""States of a trunk that trains are kept while it has moved by less than the tolerance."""

import torch

from metavpt.learners.trunk_states import TrunkStates
from metavpt.learners.vit import create_backbone


def test_states_are_kept_within_the_tolerance_and_computed_again_beyond_it() -> None:
    torch.manual_seed(0)
    backbone = create_backbone(
        "vit_tiny_dinov3", tail_blocks=1, embed_dim=24, depth=2, num_heads=2, patch_size=4
    )
    theta = {name: p.detach() for name, p in backbone.trunk.named_parameters()}
    images, passes = torch.randn(2, 3, 8, 8), []

    def read() -> list[torch.Tensor]:
        passes.append(1)
        return [images]

    kept = TrunkStates(tolerance=0.1)
    (first,) = kept(backbone.trunk, theta, "set", read)
    near = {name: 1.05 * p for name, p in theta.items()}
    assert kept(backbone.trunk, near, "set", read)[0] is first
    assert len(passes) == 1
    far = {name: 1.2 * p for name, p in theta.items()}
    (second,) = kept(backbone.trunk, far, "set", read)
    assert len(passes) == 2
    assert not torch.equal(first.tokens, second.tokens)
    assert kept(backbone.trunk, theta, None, read) is not kept(backbone.trunk, theta, None, read)
    assert len(passes) == 4
    never = TrunkStates()
    never(backbone.trunk, theta, "set", read)
    never(backbone.trunk, theta, "set", read)
    assert len(passes) == 6
