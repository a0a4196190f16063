"""The information bottleneck, watched while it runs: nothing but a task may come from the labels to the learner."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.training.strategy import Proposal, Strategy


def check_labels(strategy: Strategy, proposal: Proposal) -> None:
    """Raise MetaVPTError for a loss on labels by a strategy that does not state that it trains on them."""
    if proposal.labelled_loss is not None and not getattr(strategy, "trains_on_labels", False):
        raise MetaVPTError(
            f"{type(strategy).__name__}.next_task proposes a labelled_loss: labels would train the "
            "learner itself; a control that does so on purpose sets trains_on_labels = True"
        )


@contextmanager
def untouched(learner: nn.Module, who: str) -> Iterator[None]:
    """Raises MetaVPTError where the block, which `who` names, writes to a parameter of `learner` or leaves a gradient in its `.grad`.

    The gradients must be None before it. It costs no arithmetic: whether a gradient is there, and the count that torch keeps of writes to a
    tensor, are all that is read. A write through `.data` is not counted; nothing but a comparison of the values would see it.
    """
    live = params.named(learner)
    versions = [p._version for p in live.values()]
    yield
    for (name, p), version in zip(live.items(), versions, strict=True):
        if p.grad is not None:
            raise MetaVPTError(
                f"{who} left a gradient in learner.{name}.grad, which the next step would train on: labels would reach the learner; "
                "take gradients with torch.autograd.grad, or of theta as it is given to the loss"
            )
        if p._version != version:
            raise MetaVPTError(
                f"{who} wrote to learner.{name}: labels may reach the learner through tasks alone; leave its parameters alone"
            )
