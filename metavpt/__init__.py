"""Self-supervised pretraining steered by hypergradients of downstream value."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metavpt.errors import MetaVPTError, NonFiniteError, UnreachedParameterError
from metavpt.hypergradients.directions import AdamAware, Clipped, Cosine, Dot, Normalized
from metavpt.hypergradients.estimators import Hypergradient, Implicit, OneStep, Unrolled
from metavpt.hypergradients.linear_solvers import ConjugateGradient, Neumann, Nystrom
from metavpt.hypergradients.mixed_products import DifferenceProduct, ExactProduct
from metavpt.hypergradients.optimizer_updates import SGD, Adam, AdamW
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem
from metavpt.strategies.fixed import Fixed
from metavpt.strategies.learned import Learned
from metavpt.training.budget import Budget
from metavpt.training.run_log import RunLog
from metavpt.training.schedule import WarmupCosine

if TYPE_CHECKING:
    from metavpt.training.checkpoint import Checkpoints
    from metavpt.training.trainer import Trainer

LATER = {
    "Checkpoints": "metavpt.training.checkpoint",
    "Trainer": "metavpt.training.trainer",
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
