"""Steering inside Lightning: a callback that puts designed tasks in the place of batches."""

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer

from metavpt.errors import MetaVPTError
from metavpt.strategies.steering import Steering

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MetaVPTError(
        f"metavpt.interop.lightning needs Lightning ({error}); pip install 'metavpt[lightning]'"
    ) from error

MakeSteering = Callable[[LightningModule, Optimizer], Steering]


class SteeringCallback(Callback):
    """Give the module's `training_step` the designed task of each batch.

    Everything else stays Lightning's: loops, precision, checkpoints, logging. The measurements of
    designer updates are logged as `steering/<name>`.

    Args:
        make_steering: (module, its first optimizer) -> `Steering`, called when fitting starts.

    Example:
        >>> def steer(module, optimizer):
        ...     return Steering(module, designer, pretrain_loss, feedback_loss, labelled, optimizer)
        >>> Trainer(callbacks=[SteeringCallback(steer)]).fit(module, unlabelled)
    """

    def __init__(self, make_steering: MakeSteering) -> None:
        super().__init__()
        self.make_steering = make_steering
        self.steering: Steering | None = None
        self._restored: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the steering object and wrap `training_step`."""
        steering = self.make_steering(pl_module, trainer.optimizers[0])
        if self._restored is not None:
            steering.load_state_dict(self._restored)
        self.steering, step = steering, pl_module.training_step

        def training_step(batch: Any, *args: Any, **options: Any) -> Any:
            task = steering(batch)
            measured = {f"steering/{name}": value for name, value in steering.record.items()}
            if measured:
                pl_module.log_dict(measured)
            return step(task, *args, **options)

        pl_module.training_step = training_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the module's own `training_step`."""
        pl_module.__dict__.pop("training_step", None)

    def state_dict(self) -> dict[str, Any]:
        """Return the steering state for Lightning's checkpoint."""
        return self.steering.state_dict() if self.steering else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keep the state until fitting starts."""
        self._restored = dict(state_dict) or None
