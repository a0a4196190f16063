"""The reader of SceneParse150 on small files of every kind, and on three real pairs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metavpt.data.ade20k import ADE20K, CLASS_NAMES, read_annotation
from metavpt.dense_tasks.segmentation import IGNORE
from metavpt.errors import MetaVPTError

SIZE = (24, 32)


def save(path: Path, array: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training pairs and one for validation. The label of a pixel is its column."""
    label = np.repeat(np.arange(SIZE[1], dtype=np.uint8)[None], SIZE[0], axis=0)
    for split, names in (("training", "ab"), ("validation", "c")):
        for k, name in enumerate(names):
            save(
                tmp_path / "images" / split / f"{name}.jpg",
                np.full((*SIZE, 3), 50 + 50 * k, np.uint8),
            )
            save(tmp_path / "annotations" / split / f"{name}.png", label)
    return tmp_path


def test_frames(folder: Path):
    frames = ADE20K(folder, SIZE)
    assert (len(frames), frames.size, frames.num_classes, frames.splits) == (
        3,
        SIZE,
        150,
        {"train": [0, 1], "val": [2]},
    )
    frame = frames[1]
    assert (frame.image.dtype, frame.depth.dtype, frame.label.dtype) == (
        torch.uint8,
        torch.float32,
        torch.int64,
    )
    assert frame.image.shape == (3, *SIZE)
    assert abs(int(frame.image.float().mean()) - 100) <= 1
    assert frame.depth.shape == SIZE
    assert not frame.depth.any()
    assert frame.label[5].tolist() == [IGNORE, *range(31)]
    assert torch.equal(frames.image(1), frame.image)
    assert [CLASS_NAMES[i] for i in (0, 1, 2, 149)] == ["wall", "building", "sky", "flag"]


def test_all_labels_become_classes(tmp_path: Path):
    numbers = np.arange(151, dtype=np.uint8)[None].repeat(2, axis=0)
    save(tmp_path / "a.png", numbers)
    assert read_annotation(tmp_path / "a.png")[1].tolist() == [IGNORE, *range(150)]


def striped(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label in four blocks that tell where a pixel came from."""
    rows, columns = np.arange(height)[:, None] * 2 // height, np.arange(width)[None] * 2 // width
    block = (2 * rows + columns).astype(np.uint8)
    return np.stack([60 * block] * 3, axis=2), block + 1


@pytest.mark.parametrize("original", [(24, 32), (48, 64), (30, 100), (200, 40), (17, 17)])
@pytest.mark.parametrize("resize", ["cover", "stretch"])
def test_image_and_label_are_cut_alike(folder: Path, original: tuple[int, int], resize: str):
    image, label = striped(*original)
    (folder / "images/training/b.jpg").unlink()
    save(folder / "images/training/b.png", image)
    save(folder / "annotations/training/b.png", label)
    frame = ADE20K(folder, SIZE, resize)[1]  # type: ignore[arg-type]
    assert frame.image.shape[1:] == frame.label.shape == SIZE
    inside = np.s_[4:8, 4:10], np.s_[4:8, 22:28], np.s_[16:20, 4:10], np.s_[16:20, 22:28]
    for k, block in enumerate(inside):  # away from the edges, which interpolation blurs
        assert (frame.label[block] == k).all()
        assert (frame.image[0][block] == 60 * k).all()
    assert frame.label.unique().tolist() == [0, 1, 2, 3]  # classes are never mixed


def test_cover_keeps_the_aspect_and_stretch_the_whole(folder: Path):
    """A frame twice as wide as SIZE allows: its outer quarters are cut off, or squeezed in."""
    label = np.full((24, 64), 3, np.uint8)
    label[:, :16] = label[:, 48:] = 9
    save(folder / "images/training/b.jpg", np.zeros((24, 64, 3), np.uint8))
    save(folder / "annotations/training/b.png", label)
    assert ADE20K(folder, SIZE, "cover")[1].label.unique().tolist() == [2]
    assert ADE20K(folder, SIZE, "stretch")[1].label[0].tolist() == [8] * 8 + [2] * 16 + [8] * 8


def as_palette(label: np.ndarray) -> Image.Image:
    image = Image.fromarray(label, "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


@pytest.mark.parametrize(
    "make",
    [as_palette, lambda label: Image.fromarray(label.astype(np.uint16))],
    ids=["palette", "16_bit"],
)
def test_palette_and_16_bit_annotations_hold_numbers(
    tmp_path: Path, make: Callable[[np.ndarray], Image.Image]
):
    label = np.array([[0, 1], [17, 150]], np.uint8)
    make(label).save(tmp_path / "a.png")
    assert read_annotation(tmp_path / "a.png").tolist() == [[IGNORE, 0], [16, 149]]


@pytest.mark.parametrize(
    "image",
    [
        np.full(SIZE, 100, np.uint8),
        np.full(SIZE, 100 * 257, np.uint16),
        np.full((*SIZE, 4), 100, np.uint8),
    ],
    ids=["L", "I;16", "A"],
)
def test_grey_16_bit_and_transparent_images_become_rgb(folder: Path, image: np.ndarray):
    (folder / "images/training/b.jpg").unlink()
    save(folder / "images/training/b.png", image)
    assert torch.equal(
        ADE20K(folder, SIZE)[1].image, torch.full((3, *SIZE), 100, dtype=torch.uint8)
    )


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "annotations/training/b.png",
            np.full(SIZE, 151, np.uint8),
            r"b\.png: has label 151; labels are 0 \(ignored\) and 1 to 150",
        ),
        (
            "annotations/training/b.png",
            np.full(SIZE, 40_000, np.uint16),
            r"b\.png: has label 40000",
        ),
        ("annotations/training/b.png", np.zeros((*SIZE, 3), np.uint8), r"b\.png: holds colours"),
        (
            "annotations/training/b.png",
            np.zeros((24, 31), np.uint8),
            r"b\.png: is 24x31, but b\.jpg is 24x32",
        ),
        (
            "images/training/b.jpg",
            np.zeros((1, 1, 3), np.uint8),
            r"b\.jpg: is 1x1 pixels, below 16 a side",
        ),
    ],
)
def test_bad_files_are_named_when_they_are_read(
    folder: Path, name: str, array: np.ndarray, message: str
):
    save(folder / name, array)
    frames = ADE20K(folder, SIZE)
    assert frames[0].label.shape == SIZE
    with pytest.raises(MetaVPTError, match=message):
        frames[1]


@pytest.mark.parametrize("name", ["images/training/b.jpg", "annotations/training/b.png"])
def test_a_damaged_file_is_named(folder: Path, name: str):
    whole = (folder / name).read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"not a picture"):
        (folder / name).write_bytes(data)
        with pytest.raises(MetaVPTError, match=rf"{Path(name).name}: not a readable image"):
            ADE20K(folder, SIZE)[1]


def test_what_has_no_partner_is_counted_and_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("d", "e"):
        save(folder / "images/training" / f"{name}.jpg", np.zeros((*SIZE, 3), np.uint8))
    save(folder / "annotations/validation/z.png", np.zeros(SIZE, np.uint8))
    (folder / "images/training/._a.jpg").write_bytes(b"of macOS")
    frames = ADE20K(folder, SIZE)
    told = " ".join(capsys.readouterr().err.split())
    assert len(frames) == 3
    assert "2 images without annotation" in told
    assert "the first is d" in told
    assert "1 annotations without image" in told


def test_bad_folders(folder: Path):
    with pytest.raises(MetaVPTError, match=r"data\.resize=fill"):
        ADE20K(folder, SIZE, "fill")  # type: ignore[arg-type]
    with pytest.raises(MetaVPTError, match=r"data\.size=0x5"):
        ADE20K(folder, (0, 5))
    (folder / "annotations/validation/c.png").rename(folder / "annotations/validation/other.png")
    with pytest.raises(MetaVPTError, match="holds no image with an annotation of the same name"):
        ADE20K(folder, SIZE)
    shutil.rmtree(folder / "annotations/validation")
    with pytest.raises(MetaVPTError, match="lacks the folder annotations/validation"):
        ADE20K(folder, SIZE)


@pytest.mark.shared_data
def test_three_real_pairs(shared_data: Path, tmp_path: Path):
    """Classes from the file's own list: sky, building and tree lie where they are seen."""
    for split, numbers in (("training", (1, 2)), ("validation", (3,))):
        for kind, suffix in (("images", "jpg"), ("annotations", "png")):
            (tmp_path / kind / split).mkdir(parents=True)
            for i in numbers:
                shutil.copy(
                    shared_data / "ade20k_samples" / kind / f"ADE_val_0000000{i}.{suffix}",
                    tmp_path / kind / split,
                )
    listed = (shared_data / "ade20k_samples/objectInfo150.csv").read_text().splitlines()[1:]
    assert [line.split(",", 5)[5].strip('"').split(";")[0] for line in listed] == CLASS_NAMES
    frames = ADE20K(tmp_path, (128, 160))
    sets = [{CLASS_NAMES[k] for k in frames[i].label.unique() if k != IGNORE} for i in range(3)]
    assert {"wall", "building", "sky", "tree"} <= sets[0] | sets[1]
    assert all("sky" in found for found in sets)
    for i in range(3):
        frame = frames[i]
        assert frame.image.shape == (3, 128, 160)
        sky = frame.label == CLASS_NAMES.index("sky")
        rows = torch.arange(128)[:, None].expand(128, 160)
        assert rows[sky].float().mean() < 64  # above the middle
        assert (
            frame.image.float().mean(0)[sky].mean() > frame.image.float().mean(0)[~sky].mean()
        )  # and brighter than the rest
