"""Pools that share nothing, and evaluation images found again in the unlabelled stream."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metavpt.data.dense import DenseData
from metavpt.data.frames import RGBDFrames
from metavpt.data.images import open_images
from metavpt.data.nyuv2 import open_nyuv2
from metavpt.data.overlap import Encoded, encoded_file, overlap
from metavpt.dense_tasks.depth import DepthTask
from metavpt.errors import MetaVPTError

TASKS = [DepthTask()]


def photos(folder: Path, seeds: range) -> list[Path]:
    folder.mkdir()
    files = [folder / f"{seed:02d}.png" for seed in seeds]
    for seed, file in zip(seeds, files, strict=True):
        Image.fromarray(
            np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        ).save(file)
    return files


class Photos:
    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def encoded(self, index: int) -> Encoded:
        return encoded_file(self.files[index])


@pytest.mark.parametrize("packed", [False, True])
def test_an_evaluation_image_in_the_stream_is_found_under_any_name(tmp_path: Path, packed: bool):
    stream, val = (
        photos(tmp_path / "stream", range(6)),
        Photos(photos(tmp_path / "val", range(4, 12))),
    )
    path = tmp_path / "stream"
    if packed:
        path = tmp_path / "stream.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in stream:
                archive.write(file, f"renamed-{file.name}")
    found = overlap(open_images(path, (8, 8)), val, range(8))
    assert [name[-6:] for name in found] == ["04.png", "05.png"]
    assert overlap(open_images(path, (8, 8)), val, range(2, 8)) == []


def test_nothing_is_said_of_what_has_no_files(tmp_path: Path):
    photos(tmp_path / "stream", range(2))
    assert overlap(open_images(tmp_path / "stream", (8, 8)), object(), [0]) == []


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> RGBDFrames:
    return open_nyuv2(
        None, rooms={"folder": tmp_path_factory.mktemp("rooms"), "num_frames": 20, "size": (12, 16)}
    )


@given(
    num_train=st.integers(1, 8),
    num_meta=st.integers(1, 8),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_pools_are_disjoint_from_each_other_and_from_the_evaluation(
    frames, num_train, num_meta, share, seed
):
    data = DenseData(frames, TASKS, num_train=num_train, num_meta=num_meta, share=share, seed=seed)
    val = set(data.val)
    for pool in (data.train, data.heads, data.meta, data.held_out):
        assert pool
        assert not set(pool) & val
    assert not set(data.train) & set(data.meta)
    assert set(data.heads) <= set(data.train)
    assert num_train + num_meta == len(frames.splits["train"]) or not set(data.held_out) & set(
        data.train + data.meta
    )
    assert not set(data.unlabelled.indices) & val  # type: ignore[attr-defined]


def test_splits_that_share_a_frame_are_refused(frames: RGBDFrames, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frames, "splits", {"train": list(range(10)), "val": [9, 10, 11]})
    with pytest.raises(
        MetaVPTError, match="frame 9 and 0 more are in the train and in the val split"
    ):
        DenseData(frames, TASKS, num_train=4, num_meta=2)
