"""Checkpoints of sharded tensors in one process; test_collectives has two processes."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from metavpt.errors import MetaVPTError
from metavpt.training.checkpoint import STATE, Checkpoints, read


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def state(mesh):
    weight, moment = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3).bfloat16()
    sharded = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (weight, moment)]
    return {
        "problem": {"learner": {"trunk.weight": sharded[0], "head": torch.ones(2)}},
        "optimizer": {
            "state": {0: {"moment": sharded[1], "step": torch.tensor(3.0)}},
            "param_groups": [{"params": [0], "betas": (0.9, 0.99)}],
        },
        "name": "run",
    }


def shard_of(path):
    (file,) = path.glob("*.safetensors")
    return file


def assert_whole(found, state):
    weight, moment = (
        state["problem"]["learner"]["trunk.weight"],
        state["optimizer"]["state"][0]["moment"],
    )
    assert torch.equal(found["problem"]["learner"]["trunk.weight"], weight.full_tensor())
    assert torch.equal(found["optimizer"]["state"][0]["moment"], moment.full_tensor())
    assert found["optimizer"]["state"][0]["moment"].dtype == torch.bfloat16
    assert torch.equal(found["problem"]["learner"]["head"], torch.ones(2))
    assert found["optimizer"]["param_groups"] == [{"params": [0], "betas": (0.9, 0.99)}]
    assert found["name"] == "run"


def test_sharded_tensors_make_a_folder_and_come_back_whole(tmp_path, state):
    path = Checkpoints(tmp_path).save(3, state)
    assert path == tmp_path / "step-00000003"
    assert sorted(file.suffix for file in path.iterdir()) == [".pt", ".safetensors"]
    assert_whole(Checkpoints(tmp_path).load().state, state)


def test_they_come_back_sharded_where_they_are_to_be(tmp_path, state, mesh):
    """A moment, which does not exist before the first step, has the layout of its parameter."""
    Checkpoints(tmp_path).save(3, state)
    parameter = distribute_tensor(torch.zeros(5, 3, dtype=torch.float64), mesh, [Shard(0)])
    found = (
        Checkpoints(tmp_path)
        .load(
            {
                "problem": {"learner": {"trunk.weight": parameter}},
                "optimizer": {"state": {0: parameter}},
            }
        )
        .state
    )
    weight, moment = (
        found["problem"]["learner"].pop("trunk.weight"),
        found["optimizer"]["state"][0].pop("moment"),
    )
    assert isinstance(weight, DTensor)
    assert isinstance(moment, DTensor)
    assert torch.equal(
        weight.full_tensor(), state["problem"]["learner"]["trunk.weight"].full_tensor()
    )
    assert torch.equal(moment.full_tensor(), state["optimizer"]["state"][0]["moment"].full_tensor())


def test_files_and_folders_take_turns(tmp_path, state):
    """A run resumed with another number of processes writes the other kind; two are kept."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, state)
    checkpoints.save(2, {"name": "alone"})
    assert checkpoints.load().state["name"] == "alone"
    checkpoints.save(3, state)
    assert [path.name for path in checkpoints.paths()] == ["step-00000002.pt", "step-00000003"]
    checkpoints.save(3, {"name": "again"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002.pt",
        "step-00000003.pt",
    ]


def flip(path):
    data = bytearray(shard_of(path).read_bytes())
    data[-3] ^= 1
    shard_of(path).write_bytes(data)


def cut(path):
    shard_of(path).write_bytes(shard_of(path).read_bytes()[:-40])


def lose(path):
    shard_of(path).unlink()


def add(path):
    (path / "another.safetensors").write_bytes(shard_of(path).read_bytes())


def tear(path):
    (path / STATE).write_bytes((path / STATE).read_bytes()[:100])


@pytest.mark.parametrize("damage", [flip, cut, lose, add, tear])
def test_a_damaged_folder_is_passed_over_for_the_one_before(tmp_path, state, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    damage(checkpoints.save(2, state))
    saved = checkpoints.load()
    assert saved.path.name == "step-00000001"
    assert len(saved.unreadable) == 1
    assert "step-00000002: not a readable checkpoint" in saved.unreadable[0]
    assert_whole(saved.state, state)
    checkpoints.save(2, state)
    assert checkpoints.load().unreadable == []


def test_what_a_killed_write_left_is_cleared_away(tmp_path, state):
    torn = tmp_path / "step-00000002.partial"
    torn.mkdir()
    (torn / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half of it")
    (torn / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"of two processes then")
    Checkpoints(tmp_path).save(2, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert_whole(Checkpoints(tmp_path).load().state, state)


@pytest.mark.parametrize("file", ["shards", "state"])
def test_a_full_disk_leaves_the_older_one_and_one_clear_line(tmp_path, state, monkeypatch, file):
    checkpoints, opened = Checkpoints(tmp_path), Path.open
    checkpoints.save(1, state)

    def full(path, mode="r", *args, **options):
        if "w" in mode and (path.suffix == ".safetensors") == (file == "shards"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(
        MetaVPTError,
        match=r"step-00000002.*cannot be written \(No space left on device\).*resume=true",
    ):
        checkpoints.save(2, state)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert_whole(checkpoints.load().state, state)


class Malicious:
    def __reduce__(self):
        return (print, ("code from a checkpoint was run",))


def test_a_folder_cannot_run_code(tmp_path, state, capsys):
    """In none of its files, and not in the pickled index of DCP's own format either."""
    path = Checkpoints(tmp_path).save(1, state)
    (path / ".metadata").write_bytes(pickle.dumps(Malicious()))
    (path / "__0_0.distcp").write_bytes(pickle.dumps(Malicious()))
    assert_whole(read(path), state)
    whole = {file: file.read_bytes() for file in path.iterdir()}
    for file in (shard_of(path), path / STATE):
        file.write_bytes(pickle.dumps(Malicious()))
        with pytest.raises(MetaVPTError, match="not a readable checkpoint"):
            read(path)
        torch.save(Malicious(), file)
        with pytest.raises(MetaVPTError, match="not a readable checkpoint"):
            read(path)
        file.write_bytes(whole[file])
    outline = torch.load(path / STATE, weights_only=True)
    torch.save({**outline, "sums": {shard_of(path).name: 0, "x": Malicious()}}, path / STATE)
    with pytest.raises(MetaVPTError, match="not a readable checkpoint"):
        read(path)
    assert "code from" not in capsys.readouterr().out
