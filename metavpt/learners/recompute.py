"""Activation checkpointing of blocks: memory of one block at a time, for a third more computation."""

from typing import Any

from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from metavpt.hypergradients.params import Params


def recomputed(block: nn.Module, *args: Any, **options: Any) -> Any:
    """Return block(*args, **options), and recompute its activations in the backward pass.

    Differentiable twice. The block must not draw random numbers. It is recomputed with the
    parameters of the forward pass: in the backward pass those of a `functional_call` are no longer
    in effect, and the live ones would silently be used.
    """
    own: Params = dict(block.named_parameters())
    return checkpoint(
        lambda *inputs: functional_call(block, own, inputs, options),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
    )
