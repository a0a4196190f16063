"""Bridges to other packages: Betty, TorchOpt, learn2learn, Lightning and transformers.

The packages are optional and imported when first used.
"""

import importlib
from types import ModuleType

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import Hypergradient, OuterLoss, finite
from metavpt.hypergradients.mixed_products import differentiate, value_and_gradient
from metavpt.hypergradients.params import Params


def peer(module: str) -> ModuleType:
    """Import a module of another package.

    Raises:
        MetaVPTError: It is not installed. The message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MetaVPTError(
            f"{package}: cannot be imported ({error}); install the optional packages with `make "
            "peers`"
        ) from error


def backpropagated(
    outer_loss: OuterLoss, before: Params, after: Params, phi: Params, num_steps: int
) -> Hypergradient:
    """Return d L_down(after)/dphi; `after` holds the graph of `num_steps` steps from `before`."""
    start = float(outer_loss(params.detach(before)).detach())
    feedback_loss, g_down = value_and_gradient(outer_loss, after)
    (by_phi,) = differentiate(params.dot(g_down, after), (phi,))
    moved = params.add(params.detach(after), params.detach(before), alpha=-1.0)
    return finite(
        Hypergradient(
            by_phi,
            start - float(feedback_loss),
            1 + 2 * num_steps,
            {"feedback_loss": start},
            unit=float(params.norm(g_down) * params.norm(moved)),
        )
    )
