"""Numbers and figures read back by each tracker's library, before and after a resume; failures."""

import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from metavpt.errors import MetaVPTError
from metavpt.training import trackers
from metavpt.training.run_log import RunLog

CONFIG = {"seed": 0, "strategy": {"every": 8}}
PIXELS = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
LOSS = {1: 0.5, 2: 0.25, 3: 0.125, 4: 0.0625}


def track(tracker, folder, steps):
    """One process of a run: loss and a probe metric at `steps`, a figure at the last."""
    folder.mkdir(exist_ok=True)
    log = RunLog(folder, trackers={"one": tracker})
    log.start_trackers(CONFIG)
    for step in steps:
        log.write("train", step, loss=LOSS[step], note="text is no number", lr=float("nan"))
        log.write("probe", step, metrics={"ridge/depth_rmse": 10.0 * step})
    log.save_figures(steps[-1], {"masks": PIXELS})
    log.close()
    assert not [record for record in log.records() if record["kind"] == "warning"]


def test_tensorboard_events_of_a_resumed_run_are_one_curve(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    state = torch.get_rng_state()
    for steps in ([1, 2, 3], [3, 4]):  # killed after step 3, resumed from a checkpoint of step 2
        track(trackers.TensorBoard(), tmp_path / "run", steps)
    assert torch.equal(state, torch.get_rng_state())
    events = EventAccumulator(
        str(tmp_path / "run" / "tensorboard"), {"images": 0, "scalars": 0}
    ).Reload()
    assert {event.step: event.value for event in events.Scalars("train/loss")} == LOSS
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("probe/ridge/depth_rmse")] == [10, 20, 30, 40]
    assert set(events.Tags()["scalars"]) == {"train/loss", "probe/ridge/depth_rmse"}
    image = events.Images("masks")[-1]
    assert (image.step, image.height, image.width) == (4, 6, 4)


def leveldb_records(data):
    """The records of a LevelDB log: blocks of 32 KiB, parts after crc, length and type."""
    whole, at = b"", 7
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        at += (-at % 2**15) if -at % 2**15 < 7 else 0
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def test_wandb_stays_offline_and_a_resumed_run_keeps_its_id(tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    for steps in ([1, 2], [3, 4]):
        track(trackers.WandB(), tmp_path / "run", steps)
    identity = (tmp_path / "run" / "tracker_id").read_text()
    files = sorted(
        (tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}*/run-{identity}.wandb")
    )
    losses = {}
    for record in (
        Record.FromString(data) for path in files for data in leveldb_records(path.read_bytes())
    ):
        items = {
            (item.key or item.nested_key[0]): json.loads(item.value_json)
            for item in record.history.item
        }
        if "train/loss" in items:
            losses[items["_step"]] = items["train/loss"]
    assert losses == LOSS
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/masks_4_*.png"))


def test_mlflow_run_is_continued(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    for steps in ([1, 2], [3, 4]):
        track(trackers.MLflow(), tmp_path / "run", steps)
    client = mlflow.MlflowClient((tmp_path / "run" / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("metavpt").experiment_id])
    assert {
        metric.step: metric.value
        for metric in client.get_metric_history(run.info.run_id, "train/loss")
    } == LOSS
    assert run.data.metrics["probe/ridge/depth_rmse"] == 40
    assert run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "images",
    }


def test_mlflow_store_of_all_runs_holds_one_run_for_each_folder(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    uri = (tmp_path / "store").as_uri()
    for name in ("a", "b", "a"):
        track(trackers.MLflow(uri), tmp_path / name, [1])
    assert not (tmp_path / "a" / "mlflow").exists()
    client = mlflow.MlflowClient(uri)
    assert len(client.search_runs([client.get_experiment_by_name("metavpt").experiment_id])) == 2


TRACKIO = """
import sys
from pathlib import Path
import test_trackers
from metavpt.training import trackers
for steps in ([1, 2], [3, 4]):
    test_trackers.track(trackers.Trackio(), Path("run"), steps)
from trackio.sqlite_storage import SQLiteStorage
import json
(run,) = SQLiteStorage.get_runs("metavpt")
config = SQLiteStorage.get_run_config("metavpt", run)
print(json.dumps({"run": run, "logs": SQLiteStorage.get_logs("metavpt", run), "config": config}))
"""


def test_trackio_database_holds_one_run_of_both_processes(tmp_path):
    pytest.importorskip("trackio")
    environment = {
        **os.environ,
        "TRACKIO_DIR": str(tmp_path / "database"),
        "PYTHONPATH": os.path.dirname(__file__),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {
        entry["step"]: entry["train/loss"] for entry in found["logs"] if "train/loss" in entry
    } == LOSS
    assert [entry["step"] for entry in found["logs"] if "masks" in entry] == [2, 4]
    assert found["config"]["strategy"] == {"every": 8}
    assert (tmp_path / "database" / "metavpt.db").is_file()


@pytest.mark.parametrize(
    ("tracker", "module", "extra"),
    [
        (trackers.TensorBoard, "torch.utils.tensorboard", "tensorboard"),
        (trackers.WandB, "wandb", "wandb"),
        (trackers.Trackio, "trackio", "trackio"),
        (trackers.MLflow, "mlflow", "mlflow"),
    ],
)
def test_a_missing_package_names_its_extra(monkeypatch, tracker, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MetaVPTError, match=rf"tracker={extra}: .*pip install 'metavpt\[{extra}\]'"):
        tracker()


class Recorder:
    """A tracker in memory; raises from `fails_at` on."""

    def __init__(self, fails_at=None):
        self.fails_at, self.seen, self.closed = fails_at, [], False

    def start(self, config, folder):
        self.config = config

    def log(self, step, values):
        if self.fails_at is not None and step >= self.fails_at:
            raise ConnectionError("server\nis away")
        self.seen.append((step, values))

    def figure(self, name, step, pixels):
        self.seen.append((step, name))

    def close(self):
        self.closed = True


def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(tmp_path):
    good, bad = Recorder(), Recorder(fails_at=2)
    log = RunLog(tmp_path, trackers={"bad": bad, "good": good})
    log.start_trackers(CONFIG)
    for step in (1, 2, 3):
        log.write(
            "train", step, loss=1.0, skipped=True, seconds={"learner": 2, "designer": float("inf")}
        )
    log.save_figures(3, {"masks": PIXELS})
    log.close()
    assert [record["step"] for record in log.records() if record["kind"] == "train"] == [1, 2, 3]
    (warning,) = [record for record in log.records() if record["kind"] == "warning"]
    assert warning["step"] == 2
    assert "tracker bad" in warning["message"]
    assert "server is away" in warning["message"]
    numbers = {"train/loss": 1.0, "train/learner": 2.0}
    assert bad.seen == [(1, numbers)]
    assert good.seen == [(1, numbers), (2, numbers), (3, numbers), (3, "masks")]
    assert (good.closed, bad.closed) == (True, False)


def test_a_tracker_that_does_not_start_ends_the_run_before_it_begins(tmp_path):
    class Refused(Recorder):
        def start(self, config, folder):
            raise PermissionError("no account")

    with pytest.raises(MetaVPTError, match=r"tracker=far: does not start .*no account"):
        RunLog(tmp_path, trackers={"far": Refused()}).start_trackers(CONFIG)
