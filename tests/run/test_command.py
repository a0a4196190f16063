"""The command as users run it: kill and resume, and one line with status 2 for bad input."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest
import torch
from helpers import command_process
from rich.console import Console

from metavpt.errors import MetaVPTError
from metavpt.problem import Direction
from metavpt.run.command import Objective, data_hint, spending, summary

OPTIONS = [
    "problem=channels",
    "strategy=one_step",
    "strategy.burn_in=0",
    "budget.steps=200",
    "trainer.checkpoint_every=10",
    "trainer.log_every=5",
]
SMALL_DINO = [
    "problem=dino_masks", "budget.steps=1", "backbone.tail_blocks=1", "backbone.embed_dim=24",
    "backbone.depth=2", "backbone.num_heads=2",
    "recipe.global_size=16", "recipe.local_size=8", "data.num_train=2", "data.num_meta=1",
    "problem.feature_size=[16,16]",
    "problem.batch_size=2", "problem.meta_batch_size=2", "problem.feedback_batch_size=1",
]  # fmt: skip


def start(folder, *options, how=command_process.start):
    return how(
        folder,
        "--config-dir",
        str(command_process.EXAMPLES / "conf"),
        *options,
        environment={**command_process.WITH_EXAMPLES, "METAVPT_CACHE": str(folder / "cache")},
    )


def run(folder, *options):
    done = start(folder, *options, how=command_process.run)
    return done.returncode, done.stdout, done.stderr


def final_weights(folder):
    return torch.load(sorted((folder / "checkpoints").glob("*.pt"))[-1], weights_only=True)


def measured(folder):
    clock = {"seconds", "samples_per_s"}
    return [
        {k: v for k, v in json.loads(line).items() if k not in clock}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_kill_9_and_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path):
    assert run(tmp_path, *OPTIONS, "output=whole")[0] == 0
    killed = start(tmp_path, *OPTIONS, "output=parts")
    while killed.is_alive() and not list((tmp_path / "parts" / "checkpoints").glob("step-*.pt")):
        time.sleep(0.005)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert final_weights(tmp_path / "parts")["budget"]["steps"] < 200
    status, out, err = run(tmp_path, *OPTIONS, "output=parts", "resume=true")
    assert status == 0, err
    whole, parts = (final_weights(tmp_path / name) for name in ("whole", "parts"))
    for part in ("learner", "designer"):
        assert all(
            torch.equal(whole["problem"][part][name], value)
            for name, value in parts["problem"][part].items()
        )
    assert measured(tmp_path / "whole") == measured(tmp_path / "parts")
    assert "useful_mse" in out
    assert (tmp_path / "parts" / "report.html").is_file()


def test_two_runs_never_share_a_folder_and_resume_finds_its_own(tmp_path):
    for _ in range(2):
        assert run(tmp_path, *OPTIONS, "budget.steps=3")[0] == 0
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "report.html", "environment.json"} <= {
        path.name for path in folders[0].iterdir()
    }
    status, _, err = run(tmp_path, *OPTIONS, "budget.steps=3", "seed=9", "resume=true")
    assert status == 2
    assert "no run under runs has this configuration" in err
    assert "seed=0, now 9" in err
    assert run(tmp_path, *OPTIONS, "budget.steps=5", "resume=true")[0] == 0
    assert sorted((tmp_path / "runs").iterdir()) == folders
    newest = max(folders, key=lambda folder: (folder / "config.yaml").stat().st_mtime)
    assert final_weights(newest)["budget"]["steps"] == 5
    assert "steps: 5" in (newest / "config.yaml").read_text()


def mat(path, **changes):
    """A file in the official layout with two frames of 16x16."""
    arrays = {
        "images": np.zeros((4, 3, 16, 16), "uint8"), "depths": np.ones((4, 16, 16), "float32"),
        "labels": np.ones((4, 16, 16), "uint16"),
        "trainNdxs": np.array([[1.0, 2.0, 3.0]]), "testNdxs": np.array([[4.0]]), **changes,
    }  # fmt: skip
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array is not None:
                file[name] = array
        references = file.create_dataset("names", (1, 2), h5py.ref_dtype)
        for i, name in enumerate(("wall", "floor")):
            references[0, i] = file.create_dataset(
                f"#refs#/{i}", data=np.array([[ord(c)] for c in name], dtype="uint16")
            ).ref
    return path


def truncated(folder):
    path = mat(folder / "cut.mat")
    path.write_bytes(path.read_bytes()[:3000])
    return [f"data.path={path}"]


def not_hdf5(folder):
    (folder / "text.mat").write_text("MATLAB 5.0 MAT-file")
    return [f"data.path={folder / 'text.mat'}"]


def zip_without_a_member(folder):
    with zipfile.ZipFile(folder / "nyuv2_labeled_240x320.zip", "w") as archive:
        archive.writestr("rgb/0000.jpg", b"x")
    (folder / "splits.json").write_text(json.dumps({"train": [0], "val": [1]}))
    return [f"data.path={folder}"]


def no_valid_depth(folder):
    return [f"data.path={mat(folder / 'nan.mat', depths=np.full((4, 16, 16), np.nan, 'float32'))}"]


def foreign_checkpoint(folder):
    return ["backbone.weights=" + str(_weights(folder))]


def _weights(folder):
    torch.save({"layer.weight": torch.zeros(2)}, folder / "other.pt")
    return folder / "other.pt"


BAD = {
    "missing_path": (
        lambda folder: [f"data.path={folder}/absent.mat"],
        ["data.path", "absent.mat"],
    ),
    "truncated_mat": (truncated, ["cut.mat"]),
    "not_hdf5": (not_hdf5, ["text.mat", "HDF5"]),
    "missing_dataset": (
        lambda folder: [f"data.path={mat(folder / 'part.mat', depths=None)}"],
        ["part.mat", "depths"],
    ),
    "zip_without_a_member": (zip_without_a_member, ["nyuv2_labeled_240x320.zip", "lacks"]),
    "no_valid_depth": (no_valid_depth, ["nan.mat", "depth"]),
    "unknown_key": (
        lambda folder: ["trainer.clip_nrm=2"],
        ["trainer.clip_nrm", "trainer.clip_norm"],
    ),
    "unknown_problem": (lambda folder: ["problem=dino_nyu2"], ["problem=dino_nyu2", "dino_nyuv2"]),
    "unknown_strategy": (lambda folder: ["strategy=onestep"], ["strategy=onestep", "one_step"]),
    "patch_does_not_divide": (
        lambda folder: [f"data.path={mat(folder / 'a.mat')}", "problem.feature_size=[16,20]"],
        ["16x20", "8x8"],
    ),
    "foreign_weights": (foreign_checkpoint, ["other.pt", "vit_tiny_dinov3"]),
    "budget_without_limit": (
        lambda folder: ["budget.steps=null", f"data.path={mat(folder / 'a.mat')}"],
        ["budget.steps"],
    ),
    "output_is_taken": (
        lambda folder: [f"output={mat(folder / 'a.mat').parent}", f"data.path={folder}/a.mat"],
        ["not empty"],
    ),
}


def paths(folder):
    """What lies in the folder, but for the cache."""
    return {path for path in folder.rglob("*") if "cache" not in path.parts}


def assert_nothing_left(folder, before):
    left = paths(folder) - before
    assert not [path for path in left if path.is_file()]
    assert not left - {folder / "runs"}


def assert_one_line(err, *words):
    lines = [line for line in err.splitlines() if line.strip() and not line.startswith("data:")]
    assert len(lines) == 1, err
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(tmp_path, make, words):
    options = make(tmp_path)
    base = (
        []
        if any(option.startswith(("problem=", "backbone=")) for option in options)
        else SMALL_DINO
    )
    before = paths(tmp_path)
    status, _, err = run(tmp_path, *base, *options)
    assert status == 2, err
    assert_one_line(err, *words)
    assert_nothing_left(tmp_path, before)


def test_without_a_network_the_missing_weights_are_named(tmp_path):
    """A start of Python: transformers' hub reads the variable at import."""
    options = [
        "problem=dino_masks",
        "backbone=vit_small_dinov3",
        f"data.path={mat(tmp_path / 'a')}",
    ]
    before = paths(tmp_path)
    cache = {"METAVPT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "metavpt.run", *options],
        cwd=tmp_path,
        env={**os.environ, **cache, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, "vit_small_patch16_dinov3", "weights=")
    assert_nothing_left(tmp_path, before)


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    assert run(tmp_path, *OPTIONS, "budget.steps=3", "output=a")[0] == 0
    newest = sorted((tmp_path / "a" / "checkpoints").glob("*.pt"))[-1]
    state = torch.load(newest, weights_only=True)
    state["problem"]["learner"]["0.weight"] = torch.zeros(2, 2)
    torch.save(state, newest)
    status, _, err = run(tmp_path, *OPTIONS, "budget.steps=3", "output=a", "resume=true")
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert "step-00000003.pt" in err


RECORDS = [
    {"kind": "probe", "step": 0, "metrics": {"depth_rmse": 1.0, "seg_miou": 0.2}},
    *(
        {"kind": "designer", "step": step, "value": value}
        for step, value in zip(range(8), (1, 3, 0, 0, 0, 0, 5, 7), strict=True)
    ),
    {"kind": "train", "step": 8, "samples_per_s": 123.4},
    {
        "kind": "time",
        "step": 8,
        "seconds": {"learner": 6.0, "designer": 2.0, "task": 2.0, "probe": 90.0},
    },
    {
        "kind": "probe",
        "step": 8,
        "metrics": {"depth_rmse": 0.9, "seg_miou": 0.1},
        "directions": {"depth_rmse": "lower", "seg_miou": "higher"},
    },
]


def test_value_trend_throughput_and_shares_of_the_training_time():
    assert spending(RECORDS) == [
        "value V: +2 -> +6 over 8 designer updates",
        "throughput: 123 samples/s",
        "training time: learner 60%, designer updates 20%, task construction 20%",
    ]


def test_a_run_that_waits_for_its_data_names_the_option_that_helps():
    def run_of(**seconds: float) -> list[dict]:
        return [{"kind": "time", "step": 8, "seconds": seconds}]

    slow = run_of(learner=12.0, data=8.0, probe=90.0)
    assert "40%" in data_hint(slow, 0)
    assert "problem.num_workers=2" in data_hint(slow, 0)
    assert data_hint(slow, None) is None  # the problem has no such option
    assert data_hint(run_of(learner=18.0, data=2.0), 0) is None
    assert data_hint(run_of(learner=0.6, data=0.4), 0) is None  # too short to tell


def test_a_run_without_a_designer_says_nothing_of_its_value():
    assert (
        spending(
            [record for record in RECORDS if record["kind"] not in ("designer", "time", "train")]
        )
        == []
    )


def test_the_table_holds_step_0_the_end_and_a_verdict(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in RECORDS)
    )
    console = Console(file=io.StringIO(), width=120)
    console.print(summary(tmp_path))
    shown = console.file.getvalue()
    rmse, miou = (
        next(line for line in shown.splitlines() if name in line)
        for name in ("depth_rmse", "seg_miou")
    )
    assert rmse.split() == ["depth_rmse", "1", "0.9", "−0.1", "better"]
    assert miou.split() == ["seg_miou", "0.2", "0.1", "−0.1", "worse"]
    assert "value V: +2 -> +6" in shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ridge/seg_miou", "minimise=-ridge/seg_miou"),
        ("-ridge/depth_rmse", "minimise=ridge/depth_rmse"),
    ],
)
def test_an_objective_with_the_wrong_sign_is_told_the_right_one(text, words):
    objective = Objective.parse(text)
    directions: dict[str, Direction] = {"ridge/seg_miou": "higher", "ridge/depth_rmse": "lower"}
    with pytest.raises(MetaVPTError, match=f"^minimise={text} .* write {words}$"):
        objective.check(directions)  # type: ignore[union-attr]
    objective.check({})  # type: ignore[union-attr]


def test_a_minus_makes_the_largest_metric_the_smallest_objective():
    assert Objective.parse(None) is None
    assert Objective.parse("depth_rmse")({"depth_rmse": 0.5}) == 0.5  # type: ignore[misc]
    assert Objective.parse("-seg_miou")({"seg_miou": 0.5}) == -0.5  # type: ignore[misc]
    assert Objective.parse("-own_metric")({"own_metric": 2.0}) == -2.0  # type: ignore[misc]
