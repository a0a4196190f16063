"""Self-supervised pretraining steered by hypergradients of downstream value."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metavpt.budget import Budget
from metavpt.directions import AdamAware, Clipped, Cosine, Dot, Normalized
from metavpt.errors import MetaVPTError, NonFiniteError, UnreachedParameterError
from metavpt.hypergradient import Hypergradient, Implicit, OneStep, Unrolled
from metavpt.linear_solve import ConjugateGradient, Neumann, Nystrom
from metavpt.optimizers import SGD, Adam, AdamW
from metavpt.params import Params
from metavpt.problem import Problem
from metavpt.products import DifferenceProduct, ExactProduct
from metavpt.runlog import RunLog
from metavpt.schedule import WarmupCosine
from metavpt.strategies import Fixed, Learned

if TYPE_CHECKING:
    from metavpt.checkpoint import Checkpoints
    from metavpt.trainer import Trainer

LATER = {
    "Checkpoints": "metavpt.checkpoint",
    "Trainer": "metavpt.trainer",
}  # torch.distributed, which they bring, takes long to import

__all__ = [
    "SGD",
    "Adam",
    "AdamAware",
    "AdamW",
    "Budget",
    "Checkpoints",
    "Clipped",
    "ConjugateGradient",
    "Cosine",
    "DifferenceProduct",
    "Dot",
    "ExactProduct",
    "Fixed",
    "Hypergradient",
    "Implicit",
    "Learned",
    "MetaVPTError",
    "Neumann",
    "NonFiniteError",
    "Normalized",
    "Nystrom",
    "OneStep",
    "Params",
    "Problem",
    "RunLog",
    "Trainer",
    "UnreachedParameterError",
    "Unrolled",
    "WarmupCosine",
]


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(LATER[name]), name)
