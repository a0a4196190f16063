"""Self-supervised pretraining steered by hypergradients of downstream value."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metavpt.errors import (
    ImpureLossError,
    MetaVPTError,
    NonFiniteError,
    UnreachedParameterError,
    UnsolvedError,
    missing_extra,
)
from metavpt.hypergradients.curvature import GaussNewton
from metavpt.hypergradients.directions import AdamAware, Clipped, Cosine, Dot, Normalized
from metavpt.hypergradients.estimators import Hypergradient, Implicit, OneStep, Unrolled
from metavpt.hypergradients.functional import hypergradient
from metavpt.hypergradients.linear_solvers import (
    ConjugateGradient,
    DampedLanczos,
    Neumann,
    Nystrom,
)
from metavpt.hypergradients.mixed_products import DifferenceProduct, ExactProduct
from metavpt.hypergradients.optimizer_updates import SGD, Adam, AdamW, from_torch
from metavpt.hypergradients.params import Params, named
from metavpt.problem import Problem
from metavpt.strategies.fixed import Fixed
from metavpt.strategies.learned import Learned
from metavpt.strategies.steering import Steering
from metavpt.training.budget import Budget
from metavpt.training.run_log import RunLog
from metavpt.training.schedule import WarmupCosine

if TYPE_CHECKING:
    from metavpt.export.loading import load
    from metavpt.report import write_report
    from metavpt.strategies.amortized import Amortized
    from metavpt.strategies.controls import Adversarial, Direct, Hardest, Uniform
    from metavpt.strategies.function_space import Functional
    from metavpt.strategies.selection import Greedy, GreedySelection
    from metavpt.strategies.tilted_targets import Tilt
    from metavpt.training.checkpoint import Checkpoints
    from metavpt.training.trainer import Trainer

# Imported when first used: torch.distributed and the report are slow to import.
LATER = {
    "Adversarial": "metavpt.strategies.controls",
    "Amortized": "metavpt.strategies.amortized",
    "Checkpoints": "metavpt.training.checkpoint",
    "Direct": "metavpt.strategies.controls",
    "Functional": "metavpt.strategies.function_space",
    "Greedy": "metavpt.strategies.selection",
    "GreedySelection": "metavpt.strategies.selection",
    "Hardest": "metavpt.strategies.controls",
    "Tilt": "metavpt.strategies.tilted_targets",
    "Trainer": "metavpt.training.trainer",
    "Uniform": "metavpt.strategies.controls",
    "load": "metavpt.export.loading",
    "write_report": "metavpt.report",
}

__all__ = [
    "SGD",
    "Adam",
    "AdamAware",
    "AdamW",
    "Adversarial",
    "Amortized",
    "Budget",
    "Checkpoints",
    "Clipped",
    "ConjugateGradient",
    "Cosine",
    "DampedLanczos",
    "DifferenceProduct",
    "Direct",
    "Dot",
    "ExactProduct",
    "Fixed",
    "Functional",
    "GaussNewton",
    "Greedy",
    "GreedySelection",
    "Hardest",
    "Hypergradient",
    "Implicit",
    "ImpureLossError",
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
    "Steering",
    "Tilt",
    "Trainer",
    "Uniform",
    "UnreachedParameterError",
    "Unrolled",
    "UnsolvedError",
    "WarmupCosine",
    "from_torch",
    "hypergradient",
    "load",
    "named",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(LATER[name]), name)
    except ModuleNotFoundError as error:
        if missing := missing_extra(error):
            raise ImportError(f"metavpt.{name}: {missing}") from error
        raise
