"""The steps of an unrolled optimizer, kept so that they can be walked backwards."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.optimizer_updates import Rule, State, Update
from metavpt.hypergradients.params import Params


@dataclass(frozen=True)
class Unroll:
    """K = `num_steps` steps of an optimizer, one unlabelled batch each.

    optimizer   the rule to unroll, from fresh moments, or a function of phi that makes it, which
    learns hyper-parameters: lambda phi: SGD(lr=phi["log_lr"].exp()); by default the learner's real
    one as it stands (`update`)
    """

    num_steps: int = 4
    optimizer: Rule | Callable[[Params], Rule] | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise MetaVPTError(
                f"{type(self).__name__}: num_steps={self.num_steps} must be at least 1"
            )

    @property
    def num_batches(self) -> int:
        """Return K."""
        return self.num_steps

    @property
    def needs_update(self) -> bool:
        """Return whether the learner's optimizer is needed."""
        return self.optimizer is None

    def begin(self, theta: Params, phi: Params, update: Update | None) -> Update:
        """The optimizer, with its state, that takes the first step at theta."""
        if self.optimizer is not None:
            made = self.optimizer
            rule = made if isinstance(made, Rule) else made(phi)
            return Update(rule, theta, rule.init(params.detach(theta)))
        if update is None:
            raise MetaVPTError(
                f"{type(self).__name__}: needs an optimizer to unroll: set `optimizer`, or pass "
                "the learner's as `update`"
            )
        return update


class Trajectory:
    """The steps of a rule from (theta, state): forwards by `advance`, then once `backwards`.

    It keeps every gradient, but theta and state only at the start of each `segment` of steps; the
    rule replays the others elementwise. With `offload` what is kept waits in the CPU's memory.
    """

    def __init__(
        self, rule: Rule, theta: Params, state: State, segment: int, offload: bool = False
    ) -> None:
        self.rule, self.theta, self.state, self.segment = rule, theta, state, segment
        self.device = next(iter(theta.values())).device
        self.store = torch.device("cpu") if offload else self.device
        self._gradients: list[Params] = []
        self._starts: list[tuple[Params, State]] = []

    def advance(self, gradient: Params) -> None:
        """One step on `gradient`, which moves `theta`."""
        if len(self._gradients) % self.segment == 0:
            self._starts.append(_move(self.theta, self.state, self.store))
        self._gradients.append(_to(gradient, self.store))
        with torch.no_grad():
            self.theta, self.state = self.rule.step(self.theta, self.state, gradient)

    def backwards(self) -> Iterator[tuple[Params, State, Params]]:
        """Yield (theta_k, state_k, gradient_k) from last to first, and release each one."""
        while self._starts:
            first = self.segment * (len(self._starts) - 1)
            steps = [_move(*self._starts.pop(), self.device)]
            for gradient in self._gradients[first:-1]:
                with torch.no_grad():
                    steps.append(self.rule.step(*steps[-1], _to(gradient, self.device)))
            while steps:
                yield *steps.pop(), _to(self._gradients.pop(), self.device)


def _to(params: Params, device: torch.device) -> Params:
    return {name: p.to(device) for name, p in params.items()}


def _move(theta: Params, state: State, device: torch.device) -> tuple[Params, State]:
    return _to(theta, device), State(
        state.num_steps, {name: _to(moments, device) for name, moments in state.moments.items()}
    )
