"""Trackers in addition to the run's own log: TensorBoard, Weights & Biases, Trackio, MLflow.

All of them write to this machine unless their options say otherwise.
"""

import importlib
import os
import time
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from metavpt.errors import MetaVPTError


class Tracker(Protocol):
    """A tracker. It is constructed before the run is built, so a missing package fails early."""

    def start(self, config: dict[str, Any], folder: Path) -> None:
        """Start the run of `folder`, or continue the one that was started for it before."""
        ...

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log numbers by name, `<kind>/<name>`. Steps may repeat after a resume."""
        ...

    def figure(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Log a picture, uint8 (H, W, 3)."""
        ...

    def close(self) -> None:
        """Send everything that is buffered."""
        ...


class TensorBoard:
    """Event files in <run folder>/tensorboard; `tensorboard --logdir runs` shows all runs."""

    def __init__(self) -> None:
        self._module = _required("torch.utils.tensorboard", "tensorboard")

    def start(self, config: dict[str, Any], folder: Path) -> None:
        """Keep the folder for the first step."""
        self._config, self._folder, self._writer = config, folder / "tensorboard", None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log numbers."""
        for name, value in values.items():
            self._at(step).add_scalar(name, value, step)

    def figure(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Log a picture."""
        self._at(step).add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _at(self, step: int) -> Any:
        """Return the writer.

        The first step opens it, because a resumed run hides what an earlier process wrote from that
        step on.
        """
        if self._writer is None:
            import yaml  # of the extra `run`

            self._writer = self._module.SummaryWriter(str(self._folder), purge_step=step)
            self._writer.add_text(
                "config", f"```yaml\n{yaml.safe_dump(self._config, sort_keys=False)}```", step
            )
        return self._writer


class WandB:
    """Weights & Biases, offline in <run folder>/wandb.

    `wandb sync` uploads such a folder. With `mode: online` it is uploaded during the run.
    """

    def __init__(
        self, project: str = "metavpt", entity: str | None = None, mode: str = "offline"
    ) -> None:
        if mode != "online":
            # Read on import. Crash reports are sent even when offline.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._wandb = _required("wandb", "wandb")
        self.project, self.entity, self.mode = project, entity, mode

    def start(self, config: dict[str, Any], folder: Path) -> None:
        """Start or continue the run."""
        self._run = self._wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            dir=folder,
            id=_identity(folder),
            name=_name(folder),
            resume="allow",
            config=config,
            settings=self._wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log numbers."""
        self._run.log(values, step=step)

    def figure(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Log a picture."""
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackio:
    """Trackio's database on this machine (in TRACKIO_DIR, else in Hugging Face's cache).

    `trackio show` shows it. With `space` it is uploaded to a Space.
    """

    def __init__(self, project: str = "metavpt", space: str | None = None) -> None:
        self._trackio = _required("trackio", "trackio")
        self.project, self.space = project, space

    def start(self, config: dict[str, Any], folder: Path) -> None:
        """Start or continue the run."""
        self._run = self._trackio.init(
            self.project,
            # Runs are continued by name, and the folder alone is not unique.
            name=f"{_name(folder)} {_identity(folder)}",
            config=config,
            space_id=self.space,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log numbers."""
        self._run.log(values, step=step)

    def figure(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Log a picture."""
        self._run.log({name: self._trackio.Image(pixels)}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._trackio.finish()


class MLflow:
    """MLflow's file store in <run folder>/mlflow, or the store at `uri`.

    `uri` may be a file:// folder for all runs, sqlite:///..., or a server.
    """

    def __init__(self, uri: str | None = None, experiment: str = "metavpt") -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import
        # MLflow 3.7 and later require it for plain files.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._mlflow = _required("mlflow", "mlflow")
        self.uri, self.experiment = uri, experiment

    def start(self, config: dict[str, Any], folder: Path) -> None:
        """Start or continue the run."""
        self._client = self._mlflow.MlflowClient(self.uri or (folder / "mlflow").resolve().as_uri())
        known = self._client.get_experiment_by_name(self.experiment)
        experiment = (
            known.experiment_id if known else self._client.create_experiment(self.experiment)
        )
        identity = _identity(folder)
        found = self._client.search_runs([experiment], f"tags.metavpt_run = '{identity}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(
            experiment, run_name=_name(folder), tags={"metavpt_run": identity}
        ).info.run_id
        self._client.log_dict(self._id, config, "config.yaml")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log numbers."""
        now = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(name, value, now, step) for name, value in values.items()
        ]
        self._client.log_batch(self._id, metrics=metrics, synchronous=True)

    def figure(self, name: str, step: int, pixels: np.ndarray) -> None:
        """Log a picture."""
        self._client.log_image(self._id, pixels, key=name, step=step, synchronous=True)

    def close(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self._id)


def _required(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MetaVPTError(
            f"tracker={extra}: the package cannot be imported ({error}); pip install "
            f"'metavpt[{extra}]'"
        ) from None


def _name(folder: Path) -> str:
    return os.path.relpath(folder)


def _identity(folder: Path) -> str:
    """Return the tracker's id of the run, stored in `folder` so that a resumed run continues it."""
    path = folder / "tracker_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
