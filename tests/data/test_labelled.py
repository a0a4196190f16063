"""A user's own masks and depth maps: what is read, and what is said of files that do not fit."""

import io
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.damaged import MIB, growth
from helpers.own_images import IGNORED, NUM_CLASSES, SIZE, camvid, generate, save
from PIL import Image

from metavpt.data import shards
from metavpt.data.dense import labelled_data
from metavpt.data.labelled import LabelledImages, class_table, read_depth
from metavpt.dense_tasks.depth import DepthTask
from metavpt.dense_tasks.segmentation import IGNORE
from metavpt.errors import MetaVPTError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checked"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return camvid(tmp_path / "camvid", num_train=3, num_val=2)


def opened(root: Path, **options) -> LabelledImages:
    given = {"masks": "masks", "classes": NUM_CLASSES, "ignore_index": IGNORED, **options}
    return LabelledImages(root, **given)


def test_masks_become_classes_and_the_ignored_value_255(root: Path) -> None:
    frames = opened(root)
    assert (len(frames), frames.size, frames.num_classes) == (5, SIZE, NUM_CLASSES)
    assert frames.splits == {"train": [0, 1, 2], "val": [3, 4]}
    for i, frame in enumerate(frames[k] for k in range(5)):
        image, mask, _ = generate(i)
        assert torch.equal(frame.image, torch.from_numpy(image).permute(2, 0, 1))
        expected = np.where(mask == IGNORED, IGNORE, mask)
        assert torch.equal(frame.label, torch.from_numpy(expected).long())
        assert not frame.depth.any()
    assert any((frames[k].label == IGNORE).any() for k in range(5))
    assert torch.equal(frames.image(1), frames[1].image)


def test_tars_are_read_in_place_as_webdataset_writes_them(root: Path, tmp_path: Path) -> None:
    """Two shards of train and one of val, image and mask side by side: the frames of the folder."""
    place = tmp_path / "shards"
    place.mkdir()
    for name, part in (("train-0", [0, 1]), ("train-1", [2]), ("val-0", [3, 4])):
        with tarfile.open(place / f"{name}.tar", "w") as tar:
            for i in part:
                folder = f"{'train' if i < 3 else 'val'}/{i:03d}.png"
                tar.add(root / "images" / folder, f"{i:03d}.jpg")
                tar.add(root / "masks" / folder, f"{i:03d}.mask.png")
    own = {"images": "*-0.tar/*.jpg", "masks": "*-0.tar/*.mask.png", "val": "val-0.tar/*.jpg"}
    assert opened(place, **own).splits == {"train": [0, 1], "val": [2, 3]}
    own |= {"images": "{train-0,train-1,val-0}.tar/*.jpg"}
    own |= {"masks": "{train-0,train-1,val-0}.tar/*.mask.png"}
    frames, expected = opened(place, **own), opened(root)
    assert frames.splits == expected.splits
    for k in range(5):
        for found, of_files in zip(frames[k], expected[k], strict=True):
            assert torch.equal(found, of_files)
        assert frames.encoded(k).crc() == expected.encoded(k).crc()
        assert frames.encoded(k).size == expected.encoded(k).size
    with tarfile.open(place / "twice.tar", "w") as tar:
        for end in (".jpg", ".png"):
            tar.add(root / "images/val/003.png", f"3{end}")
    with pytest.raises(
        MetaVPTError, match=r"data\.images: \S+/3\.jpg and \S+/3\.png have one name"
    ):
        opened(place, **{**own, "images": "twice.tar/*"})


def test_depth_maps_in_tars_and_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for i in range(4):
        image, _, depth = generate(i)
        save(tmp_path / f"{i}.png", image)
        save(tmp_path / f"{i}.depth.npy", depth if i < 3 else depth[:-1])
    for name, used in (("sound", range(3)), ("broken", range(4))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for i in used:
                for end in (".png", ".depth.npy"):
                    tar.add(tmp_path / f"{i}{end}", f"rooms/{i}{end}")
    own = {"images": "sound.tar/rooms/*.png", "depths": "sound.tar/rooms/*.depth.npy"}
    frames = LabelledImages(tmp_path, **own, scale=1.0)
    assert torch.equal(frames[1].depth, torch.from_numpy(generate(1)[2]))
    broken = {key: value.replace("sound", "broken") for key, value in own.items()}
    with pytest.raises(MetaVPTError, match=r"broken\.tar/rooms/3\.depth\.npy: is 23x32 pixels"):
        LabelledImages(tmp_path, **broken, scale=1.0)


def test_a_member_never_stands_for_a_file_outside_of_its_tar(root: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in (str(root / "images/val/003.png"), "../b.png", "fine.png"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"1234"))
    assert list(shards.members(tmp_path / "a.tar")) == ["fine.png"]


@pytest.mark.parametrize(
    ("classes", "ignored", "values", "names"),
    [
        (3, 255, {0: 0, 2: 2, 255: IGNORE, 3: -1}, ["0", "1", "2"]),
        (["sky", "road"], None, {0: 0, 1: 1, 255: -1}, ["sky", "road"]),
        ({7: "road", 3: "sky"}, [0, 9], {3: 0, 7: 1, 0: IGNORE, 9: IGNORE, 1: -1}, ["sky", "road"]),
        ({1: "a", 40_000: "b"}, 0, {40_000: 1}, ["a", "b"]),
    ],
)
def test_classes_by_number_name_or_value(classes, ignored, values, names) -> None:
    table, found = class_table(classes, ignored)
    assert found == names
    assert {value: int(table[value]) for value in values} == values


@pytest.mark.parametrize(
    ("classes", "ignored", "message"),
    [
        (12, 11, r"data\.ignore_index=11: 11 is the value of a class as well"),
        (150, 0, r"data\.ignore_index=0: 0 is the value of a class"),
        (1, 255, r"1 classes; there must be 2 to 255"),
        (10**9, 255, r"1000000000 classes; there must be 2 to 255"),
        (["a", "b"], -1, r"data\.ignore_index: the value -1"),
    ],
)
def test_bad_classes_are_named(classes, ignored, message: str) -> None:
    def call() -> None:
        with pytest.raises(MetaVPTError, match=message):
            class_table(classes, ignored)

    assert growth(call) < 64 * MIB


BIG = np.zeros((SIZE[0] + 1, SIZE[1]), np.uint8)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("masks/val/004.png", np.full(SIZE, 12, np.uint8),
            r"004\.png: has the value 12, .*0 to 10.*11"),
        ("masks/train/001.png", BIG,
            r"masks/train/001\.png: is 25x32 pixels, but .*001\.png is 24x32"),
        ("masks/train/001.png", np.zeros((*SIZE, 3), np.uint8), r"001\.png: holds colours"),
        ("images/train/000.png", np.zeros((4, 4, 3), np.uint8), r"000\.png: is 4x4 pixels"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named_at_once(
    root: Path, name: str, array: np.ndarray, message: str
) -> None:
    save(root / name, array)
    with pytest.raises(MetaVPTError, match=message):
        opened(root)


def test_an_image_without_mask_is_named(root: Path) -> None:
    (root / "masks/train/001.png").unlink()
    with pytest.raises(MetaVPTError, match=r"images/train/001\.png: has no file of its name"):
        opened(root)
    (root / "train.txt").write_text("000\n002\n")  # but it may be left out
    assert len(opened(root, train="train.txt", val="images/val")) == 4


def test_a_damaged_mask_is_named(root: Path) -> None:
    (root / "masks/val/003.png").write_bytes(b"not a picture")
    with pytest.raises(MetaVPTError, match=r"003\.png: not a readable label map"):
        opened(root)


def test_who_does_not_know_the_classes_is_shown_the_values(root: Path) -> None:
    with pytest.raises(MetaVPTError, match=r"data\.classes: .*masks hold 0, 1, 2, .*11"):
        opened(root, classes=None)


def test_files_are_checked_once(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(root)
    checked = []
    monkeypatch.setattr(
        LabelledImages, "_check_item", lambda self, index: checked.append(index) or set()
    )
    opened(root)
    assert not checked
    save(root / "masks/val/004.png", np.zeros(SIZE, np.uint8))  # a changed file is read again
    opened(root)
    assert sorted(checked) == [0, 1, 2, 3, 4]
    assert len(list(cache.iterdir())) == 2


def test_classes_that_never_occur_are_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        save(root / f"masks/train/{i:03d}.png", np.full(SIZE, i, np.uint8))
    opened(root, classes=["sky", "road", "car", *"abcdefgh"])
    told = " ".join(capsys.readouterr().err.split())
    assert "3 images to train on, 2 to evaluate on (of the folder val), 11 classes" in told
    assert "in no mask of train: a, b, c, d, e, f, g, h" in told


def test_a_palette_holds_numbers_and_sizes_are_made_alike(root: Path) -> None:
    _, mask, _ = generate(1)
    palette = Image.fromarray(mask, "P")
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    palette.save(root / "masks/train/001.png")
    large = [array.repeat(2, 0).repeat(2, 1) for array in generate(2)]
    save(root / "images/train/002.png", large[0])
    save(root / "masks/train/002.png", large[1])
    frames = opened(root)
    classes = torch.from_numpy(np.where(mask == IGNORED, IGNORE, mask)).long()
    assert torch.equal(frames[1].label, classes)
    assert frames[2].image.shape[1:] == frames[2].label.shape == SIZE
    assert opened(root, size=[12, 20], resize="stretch")[0].label.shape == (12, 20)


@pytest.mark.parametrize(
    ("suffix", "scale", "dtype"), [(".png", 0.001, np.uint16), (".npy", 1.0, np.float32)]
)
def test_depth_maps(tmp_path: Path, suffix: str, scale: float, dtype: type) -> None:
    for i in range(10):
        image, _, depth = generate(i)
        depth[0, 0] = 0
        save(tmp_path / f"images/{i}.png", image)
        save(tmp_path / f"depths/{i}{suffix}", (depth / scale).astype(dtype))
    data = labelled_data(str(tmp_path), depths="depths", scale=scale, max_depth=80.0, num_meta=1)
    assert data.tasks == [DepthTask(max_depth=80.0, crop=False)]
    assert data.frames.num_classes == 0
    frame = data.frames[3]
    expected = torch.from_numpy(generate(3)[2])
    expected[0, 0] = 0
    torch.testing.assert_close(frame.depth, expected, atol=1e-3, rtol=0)
    assert (frame.label == IGNORE).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": "depths"}, r"data\.scale=None"),
        ({}, r"data\.masks and data\.depths are null"),
        ({"depths": "depths", "scale": 1.0}, r"2\.npy: no pixel has a depth above 0"),
        ({"depths": "depths", "scale": 1.0, "size": [5]}, r"data\.size=\[5\]"),
        ({"depths": "depths", "scale": 1.0, "resize": "fill"}, r"data\.resize=fill"),
    ],
)
def test_bad_depth_is_named(tmp_path: Path, options: dict, message: str) -> None:
    for i in range(3):
        save(tmp_path / f"images/{i}.png", generate(i)[0])
        save(tmp_path / f"depths/{i}.npy", np.full(SIZE, 1.0 if i < 2 else np.nan, np.float32))
    with pytest.raises(MetaVPTError, match=message):
        LabelledImages(tmp_path, **options)


def test_pools_fit_a_small_set(root: Path) -> None:
    data = labelled_data(
        str(camvid(root / "more", 10, 2)), masks="masks", classes=11, ignore_index=11
    )
    pools = (data.train, data.meta, data.held_out, data.val)
    assert [len(pool) for pool in pools] == [6, 2, 2, 2]
    assert [task.name for task in data.tasks] == ["segmentation"]


def test_threads_read_the_headers_of_arrays_one_at_a_time(tmp_path, monkeypatch):
    busy, files = threading.Lock(), [tmp_path / f"{k}.npy" for k in range(8)]
    for file in files:
        np.save(file, np.ones((4, 4), np.float32))
    load = np.load

    def alone(*arguments, **options):
        assert busy.acquire(blocking=False)  # else Python 3.11 may fail to parse a header
        try:
            time.sleep(0.005)
            return load(*arguments, **options)
        finally:
            busy.release()

    monkeypatch.setattr(np, "load", alone)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda file: read_depth(file, 2.0), files))
    assert all((depth == 2).all() for depth in read)
