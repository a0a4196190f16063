"""Blocks whose activations are made again on the way back instead of kept: memory of one block at a time, for a third more computation."""

from typing import Any

from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from metavpt.hypergradients.params import Params


def recomputed(block: nn.Module, *args: Any, **options: Any) -> Any:
    """block(*args, **options), of which autograd keeps the arguments alone. Differentiable twice; the block must draw no random numbers.

    It is made again with the parameters that it has now: on the way back those of a `functional_call` around it are gone, and without a
    word the live ones would take their place.
    """
    own: Params = dict(block.named_parameters())
    return checkpoint(
        lambda *inputs: functional_call(block, own, inputs, options),
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
    )
