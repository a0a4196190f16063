"""Hybrid sharding: four processes, as on two machines, equal one with the same batch."""

from collections import Counter

import pytest
import torch
from helpers import two_machines, two_ranks
from helpers.traffic import scaling_estimate
from helpers.two_ranks import largest_difference
from safetensors import safe_open

from metavpt import MetaVPTError
from metavpt.training.engine import make_fabric

TOLERANCE = 1e-10  # float64, and only the order of sums differs


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process, and what it found."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    return folder, two_ranks.run(folder, "small", "one_step")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, alone):
    """What the four processes found, in files."""
    folder = tmp_path_factory.mktemp("two_machines")
    (folder / "one").symlink_to(alone[0])
    two_machines.start(folder)
    return folder


def test_hybrid_sharding_equals_one_process_with_the_same_batch(folder, alone):
    """Losses, norms of the clipped gradients, hypergradients and all weights after four steps."""
    found, (_, one) = torch.load(folder / "hsdp.pt"), alone
    assert found["samples"] == one["samples"]
    assert (one["grad_norm"] > two_ranks.CLIP_NORM).all()
    assert len(one["hypergradients"]) == 2
    for part in ("loss", "grad_norm", "hypergradients", "problem"):
        assert largest_difference(one[part], found[part]) < TOLERANCE, part


@pytest.mark.parametrize("run", ["fsdp-from_hsdp", "hsdp-from_fsdp", "hsdp-from_one"])
def test_a_run_goes_on_from_the_checkpoint_of_another_kind(folder, alone, run):
    found, (_, one) = torch.load(folder / f"{run}.pt"), alone
    assert len(found["hypergradients"]) < len(one["hypergradients"])  # it did go on
    for part in ("loss", "grad_norm", "problem"):
        assert largest_difference(one[part], found[part]) < TOLERANCE, part


def test_one_process_goes_on_from_a_checkpoint_of_hybrid_sharding(folder, alone, tmp_path):
    two_ranks.checkpoints_of(folder / "hsdp", [2], tmp_path / "one")
    found, (_, one) = two_ranks.run(tmp_path / "one", "small", "one_step"), alone
    assert len(found["hypergradients"]) < len(one["hypergradients"])
    assert largest_difference(one["problem"], found["problem"]) < TOLERANCE


def test_every_shard_is_written_once(folder):
    """Two processes hold each shard, and all four write."""
    written, files = Counter(), sorted((folder / "hsdp/checkpoints/step-00000004").glob("shard-*"))
    for file in files:
        with safe_open(file, "pt") as shards:
            names = shards.keys()
            written.update({name: shards.get_tensor(name).numel() for name in names})
    problem = two_ranks.Small()
    sizes = {
        name: p.numel()
        for name, p in problem.learner.named_parameters()
        if name.startswith("trunk.")
    }
    assert len(files) == 4
    for name, count in sizes.items():
        assert written[f"problem/learner/{name}"] == count
    assert sum(written.values()) == 3 * sum(sizes.values())  # weights and two moments


def test_gathers_stay_within_a_machine_and_the_bytes_are_those_of_the_formulas(folder):
    found = torch.load(folder / "hsdp.pt")
    sizes, sent = found["sizes"], found["sent"]
    s, p = sizes["aligned"], sizes["designer"]
    model = scaling_estimate.Model("small", sizes["trunk"] + s, s, 0, p)
    expected = scaling_estimate.sent(model, "hsdp", devices=4, machine=2, number=8)
    machine, across, everyone = (0, 1), (0, 2), (0, 1, 2, 3)
    # ExactProduct averages the gradient that it differentiates, too; phi has no regularizer
    exact = 2 * 8 * (s - p) * 3 / 4
    assert sent == {
        ("step", "c10d::_allgather_base_", machine): expected.step_trunk * 2 / 3,
        ("step", "c10d::_reduce_scatter_base_", machine): expected.step_trunk / 3,
        ("step", "c10d::allreduce_", across): expected.step_shards,
        ("step", "c10d::allreduce_", everyone): expected.step_whole,
        ("step", "_c10d_functional::all_reduce", machine): 8 * 6,  # norms of six gradients
        ("update", "c10d::_allgather_base_", machine): expected.gathers,
        ("update", "c10d::allreduce_", everyone): expected.reductions + exact,
    }


def test_machines_of_one_process_have_nothing_to_shard():
    with pytest.raises(MetaVPTError, match="parallel=hsdp"):
        make_fabric("cpu", nodes=2, parallel="hsdp")
