from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metavpt.data.classified import open_classified
from metavpt.errors import MetaVPTError

SIZE = (8, 8)


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 12, 3), value, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Classes cat and dog as in ImageNet; one class is a folder deeper, as in Tiny ImageNet."""
    save(tmp_path / "train/cat/a.JPEG", 10)
    save(tmp_path / "train/cat/b.png", 20)
    save(tmp_path / "train/dog/images/c.jpg", 30)
    save(tmp_path / "val/dog/d.jpg", 40)
    (tmp_path / "train/dog/boxes.txt").write_text("no image")
    return tmp_path


def values(part) -> list[int]:
    return [round(float(part.images[i].float().mean()) / 10) for i in range(len(part.images))]


def test_a_folder_for_each_class(folder: Path):
    train, val, num_classes = open_classified(folder, SIZE)
    assert (values(train), train.labels.tolist()) == ([1, 2, 3], [0, 0, 1])
    assert (values(val), val.labels.tolist(), num_classes) == ([4], [1], 2)
    assert train.images[0].shape == (3, *SIZE)
    assert train.labels.dtype == torch.int64


def test_validation_listed_in_a_file(folder: Path):
    (folder / "val/dog/d.jpg").unlink()
    for k in range(3):
        save(folder / f"val/images/val_{k}.JPEG", 50 + 10 * k)
    (folder / "val/val_annotations.txt").write_text(
        "val_2.JPEG\tcat\t0\t0\t1\t1\nval_0.JPEG\tdog\t0\t0\t1\t1\n\n"
    )
    _, val, _ = open_classified(folder, SIZE)
    assert (values(val), val.labels.tolist()) == ([7, 5], [0, 1])
    (folder / "val/val_annotations.txt").write_text("val_2.JPEG cat\n")
    with pytest.raises(MetaVPTError, match=r"val_annotations\.txt: each line"):
        open_classified(folder, SIZE)


def arrays() -> dict[str, np.ndarray]:
    images = np.repeat(np.arange(10, 60, 10, dtype=np.uint8), 8 * 8 * 3).reshape(5, 8, 8, 3)
    return {
        "images": images,
        "label": np.array([2, 0, 1, 0, 2], np.int16),
        "split": np.array([0, 1, 0, 1, 0], np.uint8),
    }


def test_npz(tmp_path: Path):
    np.savez(tmp_path / "a.npz", **arrays())  # type: ignore[arg-type]
    for path in (tmp_path, tmp_path / "a.npz"):
        train, val, num_classes = open_classified(path, SIZE)
        assert (values(train), train.labels.tolist()) == ([1, 3, 5], [2, 1, 2])
        assert (values(val), val.labels.tolist(), num_classes) == ([2, 4], [0, 0], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "needs arrays `label` and `split`"),
        ({"split": None}, "needs arrays `label` and `split`"),
        ({"label": np.array([1, 2])}, "for each of the 5 images"),
        ({"label": np.array([1, 2, 3, -1, 0])}, "for each of the 5 images"),
        ({"label": np.ones(5)}, "a whole number"),
        ({"split": np.zeros(5)}, "no image has split 1"),
    ],
)
def test_bad_npz(tmp_path: Path, change: dict, message: str):
    np.savez(
        tmp_path / "a.npz",
        **{name: array for name, array in (arrays() | change).items() if array is not None},
    )  # type: ignore[arg-type]
    with pytest.raises(MetaVPTError, match=rf"a\.npz: .*{message}"):
        open_classified(tmp_path, SIZE)


def test_bad_folders(folder: Path, tmp_path: Path):
    save(folder / "val/fox/e.jpg", 10)
    with pytest.raises(MetaVPTError, match="class fox has no folder in"):
        open_classified(folder, SIZE)
    (folder / "val/fox/e.jpg").unlink()
    (folder / "val/dog/d.jpg").unlink()
    with pytest.raises(MetaVPTError, match="val: holds no image in a folder of its class"):
        open_classified(folder, SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(MetaVPTError, match="needs folders train and val"):
        open_classified(tmp_path / "empty", SIZE)
    with pytest.raises(MetaVPTError, match="neither a folder"):
        open_classified(tmp_path / "gone", SIZE)
    (tmp_path / "half/train/cat").mkdir(parents=True)
    with pytest.raises(MetaVPTError, match="lacks the folder val"):
        open_classified(tmp_path / "half", SIZE)


@pytest.mark.shared_data
def test_tiny_imagenet(shared_data: Path):
    train, val, num_classes = open_classified(shared_data / "tiny_imagenet", (64, 64))
    assert (len(train.images), len(val.images), num_classes) == (10_000, 2_000, 200)
    assert train.labels.bincount().tolist() == [50] * 200
    assert val.labels.bincount().tolist() == [10] * 200
    assert train.images[9_999].shape == val.images[1_999].shape == (3, 64, 64)


def test_more_classes_than_images_are_an_error(tmp_path: Path):
    given = arrays()
    given["label"] = np.array([2, 0, 1, 0, 10**9])
    np.savez(tmp_path / "c.npz", **given)
    with pytest.raises(MetaVPTError, match=r"c\.npz: has label 1000000000; 5 images"):
        open_classified(tmp_path / "c.npz", SIZE)
