import errno
import io
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from metavpt.errors import MetaVPTError
from metavpt.training.checkpoint import Checkpoints, read


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"value": torch.tensor(float(step))})
    assert [path.name for path in checkpoints.paths()] == ["step-00000002.pt", "step-00000003.pt"]
    assert float(checkpoints.load().state["value"]) == 3.0


def test_loading_restores_every_global_generator(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {})
    drawn = (torch.rand(3), random.random(), np.random.rand(3))
    checkpoints.load()
    again = (torch.rand(3), random.random(), np.random.rand(3))
    assert torch.equal(drawn[0], again[0])
    assert drawn[1] == again[1]
    assert (drawn[2] == again[2]).all()


class FullDisk(io.FileIO):
    """Takes 20 kB, then there is no room."""

    def write(self, data):
        if self.tell() + len(data) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_full_disk_leaves_the_older_checkpoint_and_one_clear_line(tmp_path, monkeypatch, size):
    """At the first byte, and amid the weights, where torch hides the error behind its own."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"value": 1})
    monkeypatch.setattr(Path, "open", lambda path, mode: FullDisk(path, mode))
    if size == 10:
        monkeypatch.setattr(
            FullDisk,
            "write",
            lambda self, data: (_ for _ in ()).throw(
                OSError(errno.ENOSPC, "No space left on device")
            ),
        )
    with pytest.raises(
        MetaVPTError,
        match=r"step-00000002\.pt: cannot be written \(No space left on device\).*resume=true",
    ):
        checkpoints.save(2, {"value": torch.zeros(size)})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert checkpoints.load().state["value"] == 1


def test_what_a_killed_write_left_is_cleared_away(tmp_path):
    (tmp_path / "step-00000001.partial").write_bytes(b"half of it")
    Checkpoints(tmp_path).save(2, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002.pt"]


def flip(path, marker):
    """Another bit in the middle of the weights, which torch.load itself does not see."""
    data = bytearray(path.read_bytes())
    data[data.index(marker) + len(marker) // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)


def cut(path, marker):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(step, {"value": torch.full((1000,), float(step))})
    damage(tmp_path / "step-00000002.pt", np.full(1000, 2.0, "float32").tobytes())
    saved = checkpoints.load()
    assert float(saved.state["value"][0]) == 1.0
    assert saved.path.name == "step-00000001.pt"
    assert len(saved.unreadable) == 1
    assert "step-00000002.pt: not a readable checkpoint" in saved.unreadable[0]
    checkpoints.save(2, {})
    assert checkpoints.load().unreadable == []


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 9):
        checkpoints.save(step, {})
    cut(tmp_path / "step-00000009.pt", b"")
    checkpoints.save(2, {})
    assert [path.name for path in checkpoints.paths()] == ["step-00000001.pt", "step-00000002.pt"]


class Malicious:
    def __reduce__(self):
        return (print, ("code from a checkpoint was run",))


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    path = tmp_path / "step-00000001.pt"
    torch.save({"random": Malicious()}, path)
    with pytest.raises(MetaVPTError, match=r"step-00000001\.pt: not a readable checkpoint"):
        read(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(MetaVPTError, match="not a readable checkpoint"):
        read(path)
    assert "code from" not in capsys.readouterr().out


def test_no_checkpoint_a_torn_one_and_a_foreign_one_are_named(tmp_path):
    with pytest.raises(MetaVPTError, match="no checkpoint here"):
        Checkpoints(tmp_path).load()
    path = Checkpoints(tmp_path).save(1, {"value": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(MetaVPTError, match=str(path)):
        read(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(MetaVPTError, match="not a checkpoint of a metavpt run"):
        Checkpoints(tmp_path).load()
