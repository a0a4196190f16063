"""Two processes that share every batch equal one process: one torchrun, many runs (two_ranks)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import two_ranks, two_ranks_shared

from metavpt import MetaVPTError
from metavpt.distributed import collectives
from metavpt.training import checkpoint
from metavpt.training.engine import make_fabric

TOLERANCE = {
    "small": 1e-10,
    "dino": 1e-8,
}  # float64, and only the order of sums differs; dino takes differences, which magnify it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes found, by torchrun with one restart allowed, in files."""
    folder = tmp_path_factory.mktemp("two_ranks")
    two_ranks.dino(folder)  # generates the rooms that the processes read
    two_ranks.run(folder / "one", "small", "one_step")  # for them to go on from
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=1",
    ]
    source = Path(two_ranks.__file__)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(source.parent), *sys.path]),
    }
    done = subprocess.run(
        [*torchrun, str(source), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """alone(problem, estimator) -> what one process finds, once for both ways to be parallel."""
    folder, found = tmp_path_factory.mktemp("alone"), {}

    def run(problem, estimator):
        if (problem, estimator) not in found:
            found[problem, estimator] = two_ranks.run(
                folder / f"{problem}-{estimator}", problem, estimator
            )
        return found[problem, estimator]

    return run


def largest_difference(a, b):
    """The largest difference of two structures, relative to the largest entry of each tensor."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((largest_difference(a[name], b[name]) for name in a), default=0.0)
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return max((largest_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, torch.Tensor) and a.is_floating_point():
        return float((a - b).abs().max() / a.abs().max().clamp_min(1e-3)) if a.numel() else 0.0
    return 0.0


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("estimator", two_ranks.ESTIMATORS)
@pytest.mark.parametrize("problem", two_ranks.PROBLEMS)
def test_two_processes_equal_one_with_the_same_batch(folder, alone, problem, estimator, parallel):
    """Losses, hypergradients and, after the last step, learner, designer, teacher and heads."""
    two, one = (
        torch.load(folder / f"{problem}-{estimator}-{parallel}.pt"),
        alone(problem, estimator),
    )
    assert two["samples"] == one["samples"]
    assert len(one["hypergradients"]) == 2
    assert all(
        float(g.abs().max()) > 0
        for by_phi in one["hypergradients"]
        for g in by_phi.values()
        if g.ndim < 4
    )
    for part in ("loss", "hypergradients", "problem"):
        assert largest_difference(one[part], two[part]) < TOLERANCE[problem], part


def test_a_run_whose_process_was_killed_goes_on_to_the_same_end(folder, alone):
    killed, whole = torch.load(folder / "killed.pt"), alone("small", "one_step")
    assert killed["samples"] == whole["samples"]
    assert len(killed["hypergradients"]) < len(
        whole["hypergradients"]
    )  # it did begin again from a checkpoint
    assert largest_difference(whole["loss"], killed["loss"]) < TOLERANCE["small"]
    assert largest_difference(whole["problem"], killed["problem"]) < TOLERANCE["small"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_process_goes_on_from_a_checkpoint_of_two(folder, alone, tmp_path, parallel):
    two_ranks.checkpoints_of(folder / f"small-one_step-{parallel}", [2], tmp_path / "one")
    found, whole = two_ranks.run(tmp_path / "one", "small", "one_step"), alone("small", "one_step")
    assert largest_difference(whole["loss"], found["loss"]) < TOLERANCE["small"]
    assert largest_difference(whole["problem"], found["problem"]) < TOLERANCE["small"]


@pytest.mark.parametrize(
    "run", ["ddp-from_one", "fsdp-from_one", "ddp-from_fsdp", "fsdp-from_damaged"]
)
def test_two_processes_go_on_from_checkpoints_of_others(folder, alone, run):
    """From one file into shards, from shards into whole tensors, and past a damaged checkpoint."""
    found, whole = torch.load(folder / f"small-one_step-{run}.pt"), alone("small", "one_step")
    assert len(found["hypergradients"]) < len(whole["hypergradients"])  # it did go on
    assert largest_difference(whole["loss"], found["loss"]) < TOLERANCE["small"]
    assert largest_difference(whole["problem"], found["problem"]) < TOLERANCE["small"]


def test_what_one_process_cannot_read_no_other_goes_on_from(folder):
    """The second process reads the damaged file; the first one reports it and goes a step back."""
    lines = [
        json.loads(line)
        for line in (folder / "small-one_step-fsdp-from_damaged" / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]
    (warning,) = [line["message"] for line in lines if line["kind"] == "warning"]
    assert "step-00000003: not a readable checkpoint" in warning
    assert "shard-00002" in warning
    assert "step-00000002" in warning


def test_a_sharded_learner_is_saved_in_shards_and_a_whole_one_in_a_file(folder):
    names = {
        parallel: {
            path.name for path in (folder / f"small-one_step-{parallel}" / "checkpoints").iterdir()
        }
        for parallel in ("ddp", "fsdp")
    }
    assert names == {
        "ddp": {f"step-{k:08d}.pt" for k in range(1, 5)},
        "fsdp": {f"step-{k:08d}" for k in range(1, 5)},
    }
    saved = folder / "small-one_step-fsdp" / "checkpoints" / "step-00000004"
    whole = checkpoint.read(folder / "small-one_step-ddp" / "checkpoints" / "step-00000004.pt")
    assert len(list(saved.glob("*.safetensors"))) == 2
    assert (
        largest_difference(whole["problem"], checkpoint.read(saved)["problem"]) < TOLERANCE["small"]
    )
    assert (
        largest_difference(
            whole["optimizer"]["state"], checkpoint.read(saved)["optimizer"]["state"]
        )
        < TOLERANCE["small"]
    )


@pytest.fixture(scope="module")
def shared(folder):
    """What two processes, and what one, find of all that ranks share beside the training step."""
    return torch.load(folder / "shared.pt"), two_ranks_shared.numbers()


@pytest.mark.parametrize("part", ["ridge", "token_shares", "tilt_scale"])
def test_losses_of_the_whole_batch_and_their_derivatives_are_those_of_one_process(shared, part):
    """Ridge heads, token-weight balance and tilt scale: value, gradient and Hessian product."""
    two, one = (found[part] for found in shared)
    assert all(float(x.abs().max()) > 1e-2 for x in one)
    assert largest_difference(one, two) < 1e-12


def test_images_are_shared_out_to_be_summarised(shared):
    (two, read), (one, _) = (found["summaries"] for found in shared)
    assert torch.equal(one, two)
    assert read == [
        [0, 2, 4],
        [1, 3, 4],
    ]  # the last one twice: under FSDP all ranks must compute as often


def test_texts_are_shared_out_to_be_read_and_written(shared):
    """The mean of batches that two processes cannot share evenly, and independent samples."""
    (two, texts), (one, expected) = (found["language"] for found in shared)
    assert two == pytest.approx(one, rel=1e-12)
    assert texts == expected
    assert len(set(texts)) == 5


def test_labelled_frames_are_shared_out_to_be_probed(shared, folder):
    """In float32 the memory layout of received features changes how convolutions round."""
    two = shared[0]["dense"]
    one = two_ranks_shared.dense(two_ranks.trainer_of(folder / "probed-alone", "dino", "one_step"))
    assert two["ddp"] == pytest.approx(one, rel=1e-6)
    assert two["fsdp"] == pytest.approx(one, rel=1e-6)


def test_with_one_process_everything_is_what_it_was():
    x = torch.randn(3)
    assert collectives.leave(x) is x
    assert collectives.mean(x) is x
    assert collectives.own(x) is x
    assert collectives.total(3) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "half"}, "precision=half"),
        ({"devices": 2, "parallel": "tensor"}, "parallel=tensor"),
        ({"devices": 0}, "devices=0"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(MetaVPTError, match=words):
        make_fabric("cpu", **options)
