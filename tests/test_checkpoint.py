import pickle
import random

import numpy as np
import pytest
import torch

from metavpt.checkpoint import Checkpoints, read
from metavpt.errors import MetaVPTError


def test_the_newest_are_kept_and_the_newest_is_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"value": torch.tensor(float(step))})
    assert [path.name for path in checkpoints.paths()] == ["step-00000002.pt", "step-00000003.pt"]
    assert float(checkpoints.load()["value"]) == 3.0


def test_loading_restores_every_global_generator(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {})
    drawn = (torch.rand(3), random.random(), np.random.rand(3))
    checkpoints.load()
    again = (torch.rand(3), random.random(), np.random.rand(3))
    assert torch.equal(drawn[0], again[0])
    assert drawn[1] == again[1]
    assert (drawn[2] == again[2]).all()


def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"value": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.save(2, {"value": 2})
    assert checkpoints.load()["value"] == 1


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
