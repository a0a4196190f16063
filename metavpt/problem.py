"""The class that a user subclasses: a learner, a task designer, and two losses."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal, TypeGuard, TypeVar

from torch import Tensor, nn
from typing_extensions import get_protocol_members

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params

Direction = Literal["lower", "higher"]  # the values of a metric that are better
Directions = Mapping[str, Direction]

SIGNS: dict[str, int] = {"lower": -1, "higher": 1}

Capability = TypeVar("Capability")


class Problem(ABC):
    """What is pretrained, on which tasks, and which feedback steers the tasks.

    Both losses are pure: equal arguments give equal values, and nothing is written. Estimators
    evaluate them many times per step. So a batch carries its own randomness (seeds, noise), and all
    state moves in `after_step`. A checkpoint holds every attribute that has a `state_dict`.

    Some strategies and commands need more than this class, for example per-sample losses. Each such
    capability is a protocol beside the code that needs it, and the check happens before step 0.

    Attributes:
        learner: The model whose parameters are theta. Only `pretrain_loss` trains it.
        designer: The module whose parameters are phi. `designer(batch)` returns a task. Only the
            value of the learner's update for `feedback_loss` trains it.
        metric_directions: Maps a metric of `evaluate` to "lower" or "higher", whichever is better.
            A metric that is missing gets no verdict.
    """

    learner: nn.Module
    designer: nn.Module
    metric_directions: Directions = MappingProxyType({})

    @abstractmethod
    def pretrain_batches(self, seed: int) -> Iterable[Any]:
        """Return unlabelled batches in an order set by `seed`.

        When they end, the trainer calls this again with another seed.
        """

    @abstractmethod
    def feedback_batches(self, seed: int) -> Iterable[Any]:
        """Return labelled batches in an order set by `seed`.

        They influence the learner only through the designer.
        """

    @abstractmethod
    def pretrain_loss(self, theta: Params, task: Any) -> Tensor:
        """Compute the pretraining loss, a scalar.

        Args:
            theta: The learner's parameters by name, as `torch.func.functional_call` takes them.
            task: What the designer made of an unlabelled batch.
        """

    @abstractmethod
    def feedback_loss(self, theta: Params, batch: Any) -> Tensor:
        """Compute the feedback loss of a labelled batch, a scalar."""

    @abstractmethod
    def evaluate(self) -> Mapping[str, float]:
        """Measure the learner on data that neither loop uses, and return metrics by name."""

    def recipe(self, batch: Any) -> Any:
        """Make the task of the baseline recipe, which `strategy=fixed` trains on.

        Default: the task of the designer, which then is never trained.
        """
        return self.designer(batch)

    def aligned_parameters(self) -> Sequence[str]:
        """Return the names of theta_S, the parameters that hypergradients pass through.

        Default: all parameters of the learner.
        """
        return list(params.named(self.learner))

    def regularizer(self, task: Any) -> Tensor | None:
        """Compute R(phi) from a task, a scalar added to the designer's loss. Default: none."""
        return None

    def fit_heads(self) -> None:  # noqa: B027 - a hook that may stay empty
        """Fit the heads that `feedback_loss` reads, with the learner frozen.

        Strategies call this before every update of the designer.
        """

    def after_step(self, task: Any, progress: float) -> None:  # noqa: B027
        """Update state that follows a step of the learner, such as an EMA teacher.

        Args:
            task: The task of the step.
            progress: The share of the budget that is spent, in [0, 1].
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all attributes that have one, by name."""
        return {
            name: value.state_dict()
            for name, value in vars(self).items()
            if hasattr(value, "state_dict")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)


def supports(problem: object, capability: type[Capability]) -> TypeGuard[Capability]:
    """Return whether `problem` has all members of a capability, which is a protocol."""
    return not missing_members(problem, capability)


def missing_members(problem: object, capability: type) -> list[str]:
    """List the members of a capability that `problem` lacks."""
    return [name for name in sorted(get_protocol_members(capability)) if not hasattr(problem, name)]


def require(problem: Problem, capability: type[Capability], needed_by: str) -> Capability:
    """Return `problem` if it has a capability.

    Args:
        problem: The problem to check.
        capability: The protocol that lists the members.
        needed_by: Who needs it, for the message: "strategy Greedy".

    Raises:
        MetaVPTError: Members are missing. The message names them and the shipped problems that
            have them.
    """
    if supports(problem, capability):
        return problem
    missing = ", ".join(missing_members(problem, capability))
    able = ", ".join(_shipped_with(capability)) or "none"
    raise MetaVPTError(
        f"{needed_by} needs {missing} ({capability.__name__}), which the problem "
        f"{type(problem).__name__} does not have; define it, or choose another strategy. "
        f"Shipped problems that have it: {able}"
    )


def aligned_names(problem: Problem, theta: Params) -> list[str]:
    """Return the names of theta_S.

    Raises:
        MetaVPTError: A name is no parameter of the learner, or there is none.
    """
    names = list(problem.aligned_parameters())
    unknown = [name for name in names if name not in theta]
    if unknown or not names:
        what = (
            f"names {unknown[0]!r}, which is no parameter of the learner"
            if unknown
            else ("is empty")
        )
        raise MetaVPTError(
            f"{type(problem).__name__}.aligned_parameters {what}; "
            f"the learner's begin with {', '.join(list(theta)[:3])}"
        )
    return names


def move_to_device(problem: Problem, device: Any) -> None:
    """Move every module of `problem` to `device`."""
    for value in vars(problem).values():
        if isinstance(value, nn.Module):
            value.to(device)


def _shipped_with(capability: type) -> list[str]:
    """List the choices of the configuration group `problem` whose class has a capability."""
    from omegaconf import OmegaConf  # only for this message

    found: list[str] = []
    for file in sorted(files("metavpt.configs").joinpath("problem").iterdir(), key=str):
        config = OmegaConf.create(file.read_text())
        target = str(OmegaConf.select(config, "problem._target_", default=""))
        module, _, name = target.rpartition(".")
        try:
            problem = getattr(importlib.import_module(module), name)
        except (ImportError, ValueError, AttributeError):  # an extra that is not installed
            continue
        if supports(problem, capability):
            found.append(file.name.removesuffix(".yaml"))
    return found


def sign(name: str, directions: Directions) -> int:
    """Look up the direction of a metric.

    Args:
        name: the metric, such as `ridge/depth_rmse`.
        directions: full names, or what follows their last `/`, to "lower" or "higher".

    Returns:
        -1 where lower is better, +1 where higher is better, 0 where the direction is not stated.
    """
    stated = directions.get(name) or directions.get(name.rsplit("/", 1)[-1])
    return SIGNS[stated] if stated else 0


def check_directions(directions: Mapping[str, Any], where: str) -> dict[str, Direction]:
    """Return a copy of `directions`; raise MetaVPTError for a value that is no direction.

    Args:
        directions: metric to "lower" or "higher".
        where: the key, attribute or file that holds them, for the message.
    """
    for name, stated in directions.items():
        if not isinstance(stated, str) or stated not in SIGNS:
            given = stated if isinstance(stated, str) else f"a {type(stated).__name__}"
            raise MetaVPTError(
                f"{where}.{name}={given}: write lower or higher, whichever is better"
            )
    return dict(directions)
