"""Trackers beside the run's own log: TensorBoard, Weights & Biases, Trackio, MLflow.

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
import yaml

from metavpt.errors import MetaVPTError


class Tracker(Protocol):
    """Made before the run is built, so that a missing package is known at once; started when nothing else can fail.

    start    a new run for `folder`, or the one that was started for it before
    log      numbers by name, `<kind>/<name>`; steps may come again after a resume
    figure   uint8 (H, W, 3)
    """

    def start(self, config: dict[str, Any], folder: Path) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def figure(self, name: str, step: int, pixels: np.ndarray) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in <run folder>/tensorboard; `tensorboard --logdir runs` shows all runs."""

    def __init__(self) -> None:
        self._module = _required("torch.utils.tensorboard", "tensorboard")

    def start(self, config: dict[str, Any], folder: Path) -> None:
        self._config, self._folder, self._writer = config, folder / "tensorboard", None

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._at(step).add_scalar(name, value, step)

    def figure(self, name: str, step: int, pixels: np.ndarray) -> None:
        self._at(step).add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _at(self, step: int) -> Any:
        """The writer.

        Opened by the first step, because a resumed run hides what an earlier process wrote from
        there on.
        """
        if self._writer is None:
            self._writer = self._module.SummaryWriter(str(self._folder), purge_step=step)
            self._writer.add_text(
                "config", f"```yaml\n{yaml.safe_dump(self._config, sort_keys=False)}```", step
            )
        return self._writer


class WandB:
    """Weights & Biases, offline in <run folder>/wandb; `wandb sync` sends such a folder, `mode: online` sends as the run goes."""

    def __init__(
        self, project: str = "metavpt", entity: str | None = None, mode: str = "offline"
    ) -> None:
        if mode != "online":
            os.environ.setdefault(
                "WANDB_ERROR_REPORTING", "false"
            )  # read on import: its crash reports go out even when offline
        self._wandb = _required("wandb", "wandb")
        self.project, self.entity, self.mode = project, entity, mode

    def start(self, config: dict[str, Any], folder: Path) -> None:
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
        self._run.log(values, step=step)

    def figure(self, name: str, step: int, pixels: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio's database on this machine (in TRACKIO_DIR, else Hugging Face's cache), for `trackio show`; `space` sends it to a Space."""

    def __init__(self, project: str = "metavpt", space: str | None = None) -> None:
        self._trackio = _required("trackio", "trackio")
        self.project, self.space = project, space

    def start(self, config: dict[str, Any], folder: Path) -> None:
        self._run = self._trackio.init(
            self.project,
            # a run is continued by its name, which a folder alone does not make unique
            name=f"{_name(folder)} {_identity(folder)}",
            config=config,
            space_id=self.space,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def figure(self, name: str, step: int, pixels: np.ndarray) -> None:
        self._run.log({name: self._trackio.Image(pixels)}, step=step)

    def close(self) -> None:
        self._trackio.finish()


class MLflow:
    """MLflow's file store in <run folder>/mlflow, or whatever `uri` names: a file:// folder for all runs, sqlite:///..., a server."""

    def __init__(self, uri: str | None = None, experiment: str = "metavpt") -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import
        os.environ.setdefault(
            "MLFLOW_ALLOW_FILE_STORE", "true"
        )  # MLflow 3.7 and later ask for this before they write plain files
        self._mlflow = _required("mlflow", "mlflow")
        self.uri, self.experiment = uri, experiment

    def start(self, config: dict[str, Any], folder: Path) -> None:
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
        now = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(name, value, now, step) for name, value in values.items()
        ]
        self._client.log_batch(self._id, metrics=metrics, synchronous=True)

    def figure(self, name: str, step: int, pixels: np.ndarray) -> None:
        self._client.log_image(self._id, pixels, key=name, step=step, synchronous=True)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _required(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MetaVPTError(
            f"tracker={extra}: its package cannot be imported ({error}); pip install "
            f"'metavpt[{extra}]'"
        ) from None


def _name(folder: Path) -> str:
    return os.path.relpath(folder)


def _identity(folder: Path) -> str:
    """What a tracker calls the run of `folder`: drawn once, then read, so that a resumed run goes on in the same place."""
    path = folder / "tracker_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
