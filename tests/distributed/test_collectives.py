"""Two processes that share every batch equal one process: one torchrun, many runs (two_ranks)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import two_ranks, two_ranks_shared
from helpers.traffic import scaling_estimate
from helpers.two_ranks import largest_difference

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
    assert (one["grad_norm"] > two_ranks.CLIP_NORM).all()
    for part in ("loss", "grad_norm", "hypergradients", "problem"):
        assert largest_difference(one[part], two[part]) < TOLERANCE[problem], part


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_step_and_an_update_send_what_the_formulas_say(folder, parallel):
    """DINO with crops of two sizes, one of them steered, and heads fitted by one step."""
    found = torch.load(folder / f"dino-one_step-{parallel}.pt")
    sizes, sent = found["sizes"], found["sent"]
    model = scaling_estimate.Model(
        "dino",
        sum(sizes.get(part, 0) for part in ("trunk", "aligned", "others")),
        *(sizes[part] for part in ("aligned", "others", "designer")),
        teacher_tokens=1,
        passes=2,
        heads=1,
        features=6 * 24,  # patches by width
        batch=8,  # the labelled batch is a quarter of what two processes would have
    )
    expected = scaling_estimate.sent(model, parallel, devices=2, number=8)
    # one gather serves both passes back, where a trunk's input needs no gradient
    spared = 8 * sizes.get("outside_blocks", 0) / 2
    centre = 2 * 8 * 16 / 2  # of DINO, a number a prototype
    gathers, reductions = "c10d::_allgather_base_", "c10d::allreduce_"
    scattered = sent.get(("step", "c10d::_reduce_scatter_base_", (0, 1)), 0)
    assert sent.get(("step", gathers, (0, 1)), 0) + scattered == expected.step_trunk - spared
    assert sent["step", reductions, (0, 1)] == expected.step_whole + centre
    assert sent.get(("update", gathers, (0, 1)), 0) == expected.gathers
    assert sent["update", reductions, (0, 1)] == expected.reductions
    depth = 4 * 4 * 32 * 48 / 2
    assert sent["update", "c10d::allgather_", (0, 1)] == expected.heads + depth


def test_what_other_estimators_send_follows_the_formulas_of_the_documentation(folder):
    """Unrolled by K = 2 steps, and Implicit, whose CG takes I = 4 products by differences."""
    found = {name: torch.load(folder / f"dino-{name}-fsdp.pt") for name in ("unrolled", "implicit")}
    sizes, k, i = found["unrolled"]["sizes"], 2, 4
    s, h, p = (sizes[part] for part in ("aligned", "others", "designer"))
    heads, there, teacher, back = 1, 2, 1, 1  # both sizes of crops there, one of them back
    numbers = {
        "unrolled": (
            heads + 2 + (2 * k - 1) * there + k * (teacher + back),
            (3 * k - 2) * (s + h) + s + (k + 1) * p,
        ),
        "implicit": (heads + 1 + 2 * there + teacher + back, (2 * i + 1) * s + 2 * p),
    }
    for name, (gathers, reduced) in numbers.items():
        sent = found[name]["sent"]
        assert sent["update", "c10d::_allgather_base_", (0, 1)] == gathers * 8 * sizes["trunk"] / 2
        assert sent["update", "c10d::allreduce_", (0, 1)] == 2 * 8 * reduced / 2


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


@pytest.mark.parametrize("part", ["ridge", "cross_fitted", "token_shares", "tilt_scale"])
def test_losses_of_the_whole_batch_and_their_derivatives_are_those_of_one_process(shared, part):
    """Ridge heads, token-weight balance and tilt scale: value, gradient and Hessian product."""
    two, one = (found[part] for found in shared)
    assert all(float(x.abs().max()) > 1e-2 for x in one)
    assert largest_difference(one, two) < 1e-12


def test_features_are_joined_by_the_bytes_of_the_formulas(shared):
    """8 frames of 24 numbers, there and back for a gradient, and again for a Hessian product."""
    sent, numbers, depth = shared[0]["sent_by"]["ridge"], 8 * 24, 4 * 8 * 4 * 6 / 2
    assert sent["step", "c10d::allgather_", (0, 1)] == 2 * 8 * numbers / 2 + depth
    assert sent["step", "c10d::_reduce_scatter_base_", (0, 1)] == 2 * 8 * numbers / 2


def test_moments_are_summed_by_the_bytes_of_the_formulas(shared):
    """Of 3 folds; there and back, again for a Hessian product, and there for residuals."""
    sent = shared[0]["sent_by"]["cross_fitted"]
    moments = 3 * (6 * 7 / 2 + 8 * 9 / 2)  # of 4 features, and of 1 and 3 targets
    model = scaling_estimate.Model("cross_fitted", 1, 1, 0, 0, moments=moments)
    expected = scaling_estimate.sent(model, "ddp", devices=2).heads
    gradients = 2 * 5 * 4  # of the loss by the weights, and of that
    means = 2 * 3 + 2 * 4  # of the classes, of the residuals of all outputs
    assert sent["step", "c10d::allreduce_", (0, 1)] == expected * 5 / 2 + 8 * (gradients + means)


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


def test_on_one_machine_hybrid_sharding_is_fsdp(shared):
    """Its processes are all that a trunk is sharded over."""
    assert shared[0]["layouts"] == {"fsdp": ["(Shard(dim=0),)"], "hsdp": ["(Shard(dim=0),)"]}


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
