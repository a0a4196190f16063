from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metavpt.report.gallery import gallery


@pytest.fixture
def figures(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    for step, pixels in enumerate(noise):
        for name in ("depth", "masks"):
            Image.fromarray(pixels).save(tmp_path / f"{name}-step{step:06d}.png")
    return tmp_path


def shown(folder: Path, **options: float) -> dict[str, list[int]]:
    return {
        name: [picture.step for picture in group]
        for name, group in gallery(folder, **options).groups.items()
    }  # type: ignore[arg-type]


def test_many_pictures_are_thinned_to_the_bound(figures: Path) -> None:
    everything = {name: [0, 2, 3, 5, 6, 8, 9, 11] for name in ("depth", "masks")}
    assert shown(figures) == everything
    sources = [
        len(picture.source) for group in gallery(figures).groups.values() for picture in group
    ]
    size = max(sources) * 3 / 4  # base64
    assert shown(figures, max_bytes=16 * size) == everything
    assert shown(figures, max_bytes=6.5 * size) == {name: [0, 6, 11] for name in ("depth", "masks")}
    assert shown(figures, max_bytes=2.5 * size) == {"depth": [0, 11]}
    assert gallery(figures, max_bytes=2.5 * size).num_left_out == 22
    assert shown(figures, max_steps=3) == {name: [0, 6, 11] for name in ("depth", "masks")}


def test_a_photo_becomes_a_webp_and_a_drawing_stays_as_it_was(tmp_path: Path) -> None:
    y, x = np.mgrid[0:200, 0:300] / 200
    photo = np.stack([x, y, x * y], -1) + np.random.default_rng(0).normal(0, 0.05, (200, 300, 3))
    Image.fromarray((255 * photo.clip(0, 1)).astype(np.uint8)).save(
        tmp_path / "photo-step000000.png"
    )
    Image.new("L", (300, 200)).save(tmp_path / "drawing-step000000.png")
    groups = gallery(tmp_path).groups
    (photo_shown,), (drawing_shown,) = groups["photo"], groups["drawing"]
    assert photo_shown.source.startswith("data:image/webp;base64,")
    assert len(photo_shown.source) < (tmp_path / "photo-step000000.png").stat().st_size / 4
    assert drawing_shown.source.startswith("data:image/png;base64,")
    assert not drawing_shown.wide


def test_a_half_written_picture_is_left_out(figures: Path) -> None:
    for step in range(2, 12):
        (figures / f"masks-step{step:06d}.png").write_bytes(b"")
    whole = (figures / "masks-step000001.png").read_bytes()
    (figures / "masks-step000001.png").write_bytes(whole[: len(whole) // 2])
    assert shown(figures)["masks"] == [0]


def test_a_folder_that_is_not_there_has_no_pictures(tmp_path: Path) -> None:
    assert gallery(tmp_path / "figures") == ({}, 0)
