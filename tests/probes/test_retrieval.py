"""Mean average precision against the official loop, and the probe on landmarks that are colours."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from metavpt.data.revisited import Query
from metavpt.errors import MetaVPTError
from metavpt.learners.vit import Features
from metavpt.probes.retrieval import RetrievalProbe, mean_average_precision

NO_IMAGES: Any = ()


def official(rankings: list[list[int]], queries: list[Query]) -> dict[str, float]:
    """compute_map and compute_ap of the released evaluation code, written as its loops."""
    levels = {
        "map_easy": ("easy", "junk hard"),
        "map_medium": ("easy hard", "junk"),
        "map_hard": ("hard", "junk easy"),
    }
    result = {}
    for name, (ok_kinds, junk_kinds) in levels.items():
        total, empty = 0.0, 0
        for ranking, query in zip(rankings, queries, strict=True):
            ok = {int(i) for kind in ok_kinds.split() for i in getattr(query, kind)}
            junk_rows = {int(i) for kind in junk_kinds.split() for i in getattr(query, kind)}
            if not ok:
                empty += 1
                continue
            pos = [r for r, row in enumerate(ranking) if row in ok]
            junk = [r for r, row in enumerate(ranking) if row in junk_rows]
            k = ij = 0
            for ip in range(len(pos)):
                while ij < len(junk) and pos[ip] > junk[ij]:
                    k += 1
                    ij += 1
                pos[ip] -= k
            for j, rank in enumerate(pos):
                precision_0 = 1.0 if rank == 0 else j / rank
                precision_1 = (j + 1) / (rank + 1)
                total += (precision_0 + precision_1) / 2 / len(ok)
        if empty < len(queries):
            result[name] = total / (len(queries) - empty)
    return result


def rows(rng: np.random.Generator, num_images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Disjoint easy, hard and junk rows; any of them may be empty."""
    kinds = rng.integers(0, 5, num_images)
    present = rng.random(3) < 0.8
    easy, hard, junk = (
        np.flatnonzero(kinds == k) if present[k] else np.array([], np.int64) for k in range(3)
    )
    return easy, hard, junk


@pytest.mark.parametrize("seed", range(20))
def test_mean_average_precision_is_the_official_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries = [Query("q", None, *rows(rng, 30)) for _ in range(6)]
    rankings = [rng.permutation(30) for _ in queries]
    expected = official([ranking.tolist() for ranking in rankings], queries)
    assert mean_average_precision(rankings, queries) == pytest.approx(expected, abs=1e-12)


def test_known_values() -> None:
    none = np.array([], np.int64)
    ranking = np.array([4, 0, 3, 1, 2])
    perfect = Query("q", None, np.array([4, 0]), none, none)
    assert mean_average_precision([ranking], [perfect]) == {
        "map_easy": 1.0,
        "map_medium": 1.0,
    }  # nothing is hard, so no map_hard
    behind_junk = Query("q", None, np.array([0]), none, np.array([4]))
    assert mean_average_precision([ranking], [behind_junk])["map_easy"] == 1.0
    second = Query("q", None, np.array([0]), none, none)
    assert mean_average_precision([ranking], [second])["map_easy"] == 0.25  # (0 + 1/2) / 2
    assert mean_average_precision([ranking], [Query("q", None, none, none, none)]) == {}


class Colours:
    sizes: set[tuple[int, ...]]

    def __init__(self) -> None:
        self.sizes = set()

    def __call__(self, images: torch.Tensor) -> Features:
        self.sizes.add(tuple(images.shape[2:]))
        patches = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2)
        return Features(patches.mean((2, 3)), patches)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A red and a blue landmark. The red query shows it only inside its box, on green."""
    (tmp_path / "jpg").mkdir()

    def save(
        name: str, colour: tuple[int, int, int], size: tuple[int, int] = (40, 60)
    ) -> np.ndarray:
        array = np.full((*size, 3), colour, np.uint8)
        Image.fromarray(array).save(tmp_path / "jpg" / f"{name}.jpg", quality=95)
        return array

    save("red_1", (200, 20, 20))
    save("red_2", (150, 60, 60), (60, 30))
    save("blue_1", (20, 20, 200))
    save("green_1", (20, 200, 20))
    query = save("query", (20, 200, 20))
    query[10:30, 15:45] = (200, 20, 20)
    Image.fromarray(query).save(tmp_path / "jpg/query.jpg", quality=95)
    gnd = {
        "imlist": ["blue_1", "red_2", "green_1", "red_1"],
        "qimlist": ["query"],
        "gnd": [{"bbx": [15, 10, 45, 30], "easy": [3], "hard": [1], "junk": []}],
    }
    (tmp_path / "gnd_colours.pkl").write_bytes(pickle.dumps(gnd))
    return tmp_path


def test_the_box_of_the_query_is_what_is_searched(folder: Path) -> None:
    colours = Colours()
    metrics = RetrievalProbe(str(folder), size=30)(colours, NO_IMAGES)
    assert metrics == {"colours/map_easy": 1.0, "colours/map_medium": 1.0, "colours/map_hard": 1.0}
    assert colours.sizes == {(20, 30), (30, 15)}  # the longer side is `size`, the aspect stays


def test_without_the_box_the_surroundings_win(folder: Path) -> None:
    gnd = pickle.loads((folder / "gnd_colours.pkl").read_bytes())
    gnd["gnd"][0]["bbx"] = None
    (folder / "gnd_colours.pkl").write_bytes(pickle.dumps(gnd))
    assert RetrievalProbe(str(folder), size=30)(Colours(), NO_IMAGES)["colours/map_easy"] < 0.5


def test_missing_images_and_empty_boxes_are_named(folder: Path) -> None:
    gnd = pickle.loads((folder / "gnd_colours.pkl").read_bytes())
    gnd["gnd"][0]["bbx"] = [50, 10, 50, 30]
    (folder / "gnd_colours.pkl").write_bytes(pickle.dumps(gnd))
    with pytest.raises(MetaVPTError, match=r"query has the empty box"):
        RetrievalProbe(str(folder))(Colours(), NO_IMAGES)
    (folder / "jpg/green_1.jpg").unlink()
    with pytest.raises(MetaVPTError, match=r"green_1\.jpg: is in the ground truth but not there"):
        RetrievalProbe(str(folder))(Colours(), NO_IMAGES)
    with pytest.raises(MetaVPTError, match="size=0"):
        RetrievalProbe(str(folder), size=0)
