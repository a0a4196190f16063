"""Steering inside transformers: a mixin for `transformers.Trainer`."""

from typing import Any

from torch.optim import Optimizer

from metavpt.errors import MetaVPTError
from metavpt.strategies.steering import Steering


class SteeringMixin:
    """Give the model the designed task of each batch. Inherit from it before `Trainer`.

    A task is a mapping, which the trainer passes to the model as keyword arguments. The
    measurements of designer updates are logged as `steering/<name>`.

    Example:
        >>> class Steered(SteeringMixin, Trainer):
        ...     def make_steering(self, optimizer):
        ...         return Steering(self.model, designer, loss, feedback_loss, labelled, optimizer)
    """

    steering: Steering | None = None

    def make_steering(self, optimizer: Optimizer) -> Steering:
        """Return the steering object; called before the first step."""
        raise MetaVPTError(f"{type(self).__name__}: define make_steering(optimizer)")

    def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Design the task, then take the trainer's own step on it."""
        trainer: Any = self
        if self.steering is None:
            own = trainer.optimizer
            self.steering = self.make_steering(getattr(own, "optimizer", own))
        task = self.steering(trainer._prepare_inputs(inputs))
        if record := self.steering.record:
            trainer.log({f"steering/{name}": value for name, value in record.items()})
        own_step: Any = super().training_step  # pyright: ignore[reportAttributeAccessIssue]
        return own_step(model, task, *args, **options)
