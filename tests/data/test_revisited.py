import collections
import os
import pickle
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from metavpt.data.revisited import open_revisited, read_plain_pickle
from metavpt.errors import MetaVPTError

GND = {
    "imlist": ["all_souls_000000", "all_souls_000001", "radcliffe_000002"],
    "qimlist": ["all_souls_000013", "oxford_000317"],
    "gnd": [
        {"bbx": [136.5, 34.1, 648.5, 955.7], "easy": [0], "hard": [1, 2], "junk": []},
        {
            "bbx": None,
            "easy": np.array([1]),
            "hard": np.array([], np.int64),
            "junk": np.array([0, 2]),
        },
    ],
}


def write(folder: Path, content: object, protocol: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(content, protocol))
    return folder


@pytest.mark.parametrize("protocol", range(6))
def test_the_official_layout(tmp_path: Path, protocol: int):
    truth = open_revisited(write(tmp_path, GND, protocol))
    assert (truth.name, truth.folder, truth.images) == (
        "roxford5k",
        tmp_path / "jpg",
        GND["imlist"],
    )
    first, second = truth.queries
    assert (first.name, first.box) == ("all_souls_000013", (136.5, 34.1, 648.5, 955.7))
    assert [part.tolist() for part in first[2:]] == [[0], [1, 2], []]
    assert second.box is None
    assert [part.tolist() for part in second[2:]] == [[1], [], [0, 2]]


def test_names_of_numpy_1(tmp_path: Path):
    """Files written before numpy 2 name its parts differently."""
    data = pickle.dumps({"a": np.arange(3), "b": np.float64(0.5)}, 2).replace(
        b"numpy._core.multiarray", b"numpy.core.multiarray"
    )
    assert b"numpy.core." in data
    (tmp_path / "a.pkl").write_bytes(data)
    read = read_plain_pickle(tmp_path / "a.pkl")
    assert read["a"].tolist() == [0, 1, 2]
    assert read["b"] == 0.5


class Runs:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("hidden_in", ["top", "list", "array", "key"])
def test_a_pickle_that_runs_code_is_refused_before_it_does(tmp_path: Path, hidden_in: str):
    trap = Runs(tmp_path / "made")
    content = {
        "top": trap,
        "list": [1, trap],
        "array": np.array([trap], dtype=object),
        "key": {"gnd": {"easy": trap}},
    }[hidden_in]
    with pytest.raises(
        MetaVPTError, match=r"gnd_roxford5k\.pkl: .*asks for (posix|nt)\.mkdir, which is refused"
    ):
        open_revisited(write(tmp_path, content))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content",
    [collections.OrderedDict(a=1), eval, np.load, pickle.loads],
    ids=lambda x: type(x).__name__,
)
def test_whatever_is_not_plain_is_refused(tmp_path: Path, content: object):
    with pytest.raises(MetaVPTError, match="which is refused"):
        open_revisited(write(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no ground truth"),
        ({"imlist": [], "qimlist": [], "gnd": []}, "lists no image"),
        ({**GND, "gnd": GND["gnd"][:1]}, "no ground truth"),
        ({**GND, "gnd": [{"easy": [0], "hard": []}] * 2}, "'junk'"),
        ({**GND, "gnd": [{"easy": [3], "hard": [], "junk": []}] * 2}, "beyond the 3 listed"),
        ({**GND, "gnd": [{"easy": [-1], "hard": [], "junk": []}] * 2}, "beyond the 3 listed"),
        ({**GND, "gnd": [{"easy": ["x"], "hard": [], "junk": []}] * 2}, "no ground truth"),
        (
            {**GND, "gnd": [{"bbx": [1, 2], "easy": [0], "hard": [], "junk": []}] * 2},
            "no ground truth",
        ),
    ],
)
def test_other_content_is_named(tmp_path: Path, content: object, message: str):
    with pytest.raises(MetaVPTError, match=rf"gnd_roxford5k\.pkl: .*{message}"):
        open_revisited(write(tmp_path, content))


def test_damaged_and_missing_files(tmp_path: Path):
    with pytest.raises(MetaVPTError, match="exactly one gnd_<name>"):
        open_revisited(tmp_path)
    with pytest.raises(MetaVPTError, match="exactly one gnd_<name>"):
        open_revisited(tmp_path / "gone")
    whole = (write(tmp_path, GND) / "gnd_roxford5k.pkl").read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "gnd_roxford5k.pkl").write_bytes(whole[:cut])
        with pytest.raises(MetaVPTError, match="cannot be read as a pickle"):
            open_revisited(tmp_path)
    for _ in range(200):  # a byte changed: read, or refused in one line, and nothing else
        at = int(rng.integers(len(whole)))
        (tmp_path / "gnd_roxford5k.pkl").write_bytes(
            whole[:at] + bytes([rng.integers(256)]) + whole[at + 1 :]
        )
        with suppress(MetaVPTError):
            open_revisited(tmp_path)
