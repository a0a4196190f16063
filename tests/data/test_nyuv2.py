import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from metavpt.data.nyuv2 import (
    CLASSES,
    MAT_NAME,
    ZIP_NAME,
    NYUv2Mat,
    NYUv2Zip,
    class_table,
    official_train_rows,
    open_nyuv2,
)
from metavpt.data.rooms import CLASS_NAMES
from metavpt.dense_tasks.segmentation import IGNORE
from metavpt.errors import MetaVPTError

SIZE = (6, 8)
NAMES = ["wall", "book stand", "floor", "television", "sofa"]


def write_mat(
    path: Path,
    num_frames: int = 5,
    names: list[str] = NAMES,
    change: Callable[[h5py.File], None] = lambda file: None,
):
    """A file in the official layout and its arrays, upright: images, depths and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (num_frames, *SIZE, 3), dtype=np.uint8)
    depths = rng.uniform(0.7, 9.9, (num_frames, *SIZE)).astype(np.float32)
    labels = rng.integers(0, len(names) + 1, (num_frames, *SIZE)).astype(np.uint16)
    with h5py.File(path, "w") as file:
        file["images"], file["depths"], file["labels"] = (
            images.transpose(0, 3, 2, 1),
            depths.swapaxes(1, 2),
            labels.swapaxes(1, 2),
        )
        references = file.create_dataset("names", (1, len(names)), h5py.ref_dtype)
        for i, name in enumerate(names):
            references[0, i] = file.create_dataset(
                f"#refs#/{i}", data=np.array([[ord(letter)] for letter in name], "uint16")
            ).ref
        file["trainNdxs"], file["testNdxs"] = np.array([[1.0, 4.0, 5.0]]), np.array([[2.0, 3.0]])
        change(file)
    return images, depths, labels


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(array).save(data, kind)
    return data.getvalue()


def write_zip(
    folder: Path, change: Callable[[dict[str, bytes]], None] = lambda members: None
) -> Path:
    """Rows 3, 7 and 9 as in the shared zip. A pixel's label is its column, its code 20 + row."""
    members = {}
    for row in (3, 7, 9):
        members[f"rgb/{row:04d}.jpg"] = png(np.full((*SIZE, 3), 10 * row, np.uint8), "JPEG")
        members[f"depth/{row:04d}.png"] = png(
            np.repeat(np.arange(20, 20 + SIZE[0], dtype=np.uint8)[:, None], SIZE[1], axis=1)
        )
        members[f"label40/{row:04d}.png"] = png(
            np.repeat(np.arange(SIZE[1], dtype=np.uint8)[None], SIZE[0], axis=0)
        )
    change(members)
    with zipfile.ZipFile(folder / ZIP_NAME, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    (folder / "splits.json").write_text(json.dumps({"train": [3, 9], "val": [7]}))
    return folder / ZIP_NAME


def test_mat_is_read_upright(tmp_path: Path):
    images, depths, labels = write_mat(tmp_path / "n.mat")
    frames = open_nyuv2(tmp_path / "n.mat")
    assert (len(frames), frames.size, frames.num_classes) == (5, SIZE, 13)
    assert frames.splits == {"train": [0, 3, 4], "val": [1, 2]}
    table = np.array(
        [
            IGNORE,
            *(
                frames.class_names.index(name) if name else IGNORE
                for name in ("wall", "", "floor", "tv", "sofa")
            ),
        ]
    )
    for i, frame in enumerate(map(frames.__getitem__, range(5))):
        assert (frame.image.numpy() == images[i].transpose(2, 0, 1)).all()
        assert (frame.depth.numpy() == depths[i]).all()
        assert (frame.label.numpy() == table[labels[i]]).all()
        assert torch.equal(frames.image(i), frame.image)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_readers_survive_forked_workers(tmp_path: Path, num_workers: int):
    write_mat(tmp_path / "n.mat", num_frames=5)
    for frames in (open_nyuv2(tmp_path / "n.mat"), open_nyuv2(write_zip(tmp_path))):
        direct = [frames[i] for i in range(len(frames))]  # open in the parent, before the fork
        loaded = list(DataLoader(frames, batch_size=None, num_workers=num_workers))
        for one, other in zip(direct, loaded, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        copy = pickle.loads(pickle.dumps(frames))
        assert torch.equal(copy[0].depth, direct[0].depth)


def test_another_process_opens_a_handle_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_mat(tmp_path / "n.mat")
    mat, packed = NYUv2Mat(tmp_path / "n.mat"), NYUv2Zip(write_zip(tmp_path))
    expected = mat[0], packed[0]
    handles = mat._file, packed.archive._handle
    monkeypatch.setattr(os, "getpid", lambda: -1)
    for frame, again in zip((mat[0], packed[0]), expected, strict=True):
        assert torch.equal(frame.image, again.image)
    assert mat._file is not handles[0]
    assert packed.archive._handle is not handles[1]


def test_official_split():
    train = official_train_rows()
    assert len(train) == len(set(train)) == 795
    assert train[:5] == [2, 3, 4, 5, 6]
    assert set(train) <= set(range(1449))


def test_a_file_of_1449_frames_without_a_split_has_the_official_one(tmp_path: Path):
    def enlarge(file: h5py.File) -> None:
        for name in ("images", "depths", "labels", "trainNdxs", "testNdxs"):
            del file[name]
        file.create_dataset("images", (1449, 3, 2, 2), "uint8")
        file.create_dataset("depths", (1449, 2, 2), "float32")
        file.create_dataset("labels", (1449, 2, 2), "uint16")

    write_mat(tmp_path / "n.mat", change=enlarge)
    splits = NYUv2Mat(tmp_path / "n.mat").splits
    assert (len(splits["train"]), len(splits["val"])) == (795, 654)
    assert not set(splits["train"]) & set(splits["val"])


def test_class_tables():
    names40, table = class_table(["unlabelled things", "floor", "wall"], 40)
    assert (len(names40), names40[-1]) == (40, "otherprop")
    assert table.tolist() == [IGNORE, IGNORE, names40.index("floor"), names40.index("wall")]
    names13, table = class_table(CLASSES["names40"][1:], 13)
    assert len(names13) == 13
    assert [names13[i] for i in table[[1, 2, 3, 25, 39, 40]]] == [
        "wall",
        "floor",
        "furniture",
        "tv",
        "furniture",
        "objects",
    ]
    for own in (CLASS_NAMES, names13, ["red", "blue"]):
        names, table = class_table(own, 40)
        assert names == own
        assert table.tolist() == [IGNORE, *range(len(own))]


def test_the_894_official_classes():
    """Known raw numbers: 21 wall, 11 floor, 5 chair, 88 bookshelf; 161, 94 and 1 are the others."""
    raw = [f"thing {k}" for k in range(1, 895)]
    raw[21 - 1], raw[11 - 1], raw[5 - 1], raw[88 - 1] = "wall", "floor", "chair", "bookshelf"
    names, table = class_table(raw, 40)
    known = {
        0: None,
        1: "otherprop",
        5: "chair",
        11: "floor",
        21: "wall",
        88: "bookshelf",
        94: "otherstructure",
        161: "otherfurniture",
    }
    for k, name in known.items():
        assert table[k] == (IGNORE if name is None else names.index(name))
    assert len(table) == 895
    assert (len(CLASSES["raw_otherstructure"]), len(CLASSES["raw_otherfurniture"])) == (68, 82)
    names, table = class_table(raw, 13)
    assert [names[table[k]] for k in (1, 94, 161)] == ["objects", "objects", "furniture"]


def test_zip_frames_and_folder(tmp_path: Path):
    path = write_zip(tmp_path)
    for frames in (open_nyuv2(path), open_nyuv2(tmp_path)):
        assert isinstance(frames, NYUv2Zip)
        assert (len(frames), frames.size, frames.splits) == (3, SIZE, {"train": [0, 2], "val": [1]})
        frame = frames[2]
        assert abs(int(frame.image[0, 0, 0]) - 90) <= 1
        np.testing.assert_allclose(
            frame.depth[:, 0], (np.arange(20, 26) + 0.5) * 9.99547 / 255, rtol=1e-6
        )
        expected = ["wall", "floor", "furniture", "bed", "chair", "sofa", "table"]
        assert frame.label[0].tolist() == [
            IGNORE,
            *(frames.class_names.index(name) for name in expected),
        ]
    assert open_nyuv2(path, 40)[0].label[0].tolist() == [IGNORE, 0, 1, 2, 3, 4, 5, 6]


def test_a_folder_with_the_official_file(tmp_path: Path):
    write_mat(tmp_path / MAT_NAME)
    assert len(open_nyuv2(tmp_path)) == 5


def test_rooms_are_the_default(tmp_path: Path):
    frames = open_nyuv2(None, rooms={"folder": str(tmp_path), "num_frames": 5, "size": [12, 16]})
    assert (len(frames), frames.size, frames.class_names) == (5, (12, 16), CLASS_NAMES)
    with pytest.raises(MetaVPTError, match=r"data\.rooms\.frames: no such key"):
        open_nyuv2(None, rooms={"frames": 5})


def test_bad_paths(tmp_path: Path):
    with pytest.raises(MetaVPTError, match=r"data\.path=.*gone\.mat"):
        open_nyuv2(tmp_path / "gone.mat")
    with pytest.raises(MetaVPTError, match="the folder holds neither"):
        open_nyuv2(tmp_path)
    with pytest.raises(MetaVPTError, match=r"data\.num_classes=7"):
        open_nyuv2(tmp_path, 7)


def replace(name: str, array: np.ndarray) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = array

    return change


def remove(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("depths"), "lacks the dataset 'depths'"),
        (remove("names"), "lacks the dataset 'names'"),
        (remove("trainNdxs"), "5 frames, not the official 1449"),
        (replace("images", np.zeros((5, 8, 6), np.uint8)), r"images is uint8 \(5, 8, 6\)"),
        (replace("images", np.zeros((5, 3, 8, 6), np.float32)), "images is float32"),
        (
            replace("labels", np.zeros((5, 6, 8), np.uint16)),
            r"labels is \(5, 6, 8\), not \(5, 8, 6\)",
        ),
        (replace("names", np.zeros((1, 5))), "names is not a cell array"),
        (replace("testNdxs", np.array([[4.0]])), "disjoint rows from 1 to 5"),
        (replace("testNdxs", np.array([[6.0]])), "disjoint rows from 1 to 5"),
    ],
)
def test_bad_mat_layout(tmp_path: Path, change: Callable[[h5py.File], None], message: str):
    write_mat(tmp_path / "n.mat", change=change)
    with pytest.raises(MetaVPTError, match=rf"n\.mat: .*{message}"):
        open_nyuv2(tmp_path / "n.mat")


def test_unreadable_mat(tmp_path: Path):
    path = tmp_path / "n.mat"
    write_mat(path)
    whole = path.read_bytes()
    for data in (b"MATLAB 5.0 MAT-file" * 100, b"", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(MetaVPTError, match=r"n\.mat: not a MATLAB 7\.3"):
            open_nyuv2(path)


def test_bad_mat_frames(tmp_path: Path):
    path = tmp_path / "n.mat"
    write_mat(path, change=replace("depths", np.full((5, 8, 6), np.nan, np.float32)))
    with pytest.raises(MetaVPTError, match=r"n\.mat: frame 4: the depth map has no valid pixel"):
        open_nyuv2(path)[4]
    write_mat(path, change=replace("labels", np.full((5, 8, 6), 9, np.uint16)))
    with pytest.raises(MetaVPTError, match=r"n\.mat: frame 4 has label 9"):
        open_nyuv2(path)[4]


def put(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({name: data})


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        ("rgb/0009.jpg", b"not a picture", "rgb/0009.jpg"),
        (
            "rgb/0009.jpg",
            png(np.zeros((5, 5, 3), np.uint8), "JPEG"),
            "rgb/0009 is 5x5, the others are 6x8",
        ),
        ("depth/0009.png", png(np.zeros((5, 5), np.uint8)), "depth/0009 is 5x5"),
        ("depth/0009.png", png(np.zeros((6, 8, 3), np.uint8)), "depth/0009.png has 3 dimensions"),
        ("label40/0009.png", b"\x89PNG\r\n", "label40/0009.png is not a readable image"),
        ("label40/0009.png", png(np.full(SIZE, 77, np.uint8)), "label40/0009.png has label 77"),
    ],
)
def test_bad_zip_members(tmp_path: Path, member: str, data: bytes, message: str):
    frames = open_nyuv2(write_zip(tmp_path, put(member, data)))
    assert frames[0].image.shape == (3, *SIZE)
    with pytest.raises(MetaVPTError, match=rf"{ZIP_NAME}: .*{message}"):
        frames[2]


def test_bad_zips(tmp_path: Path):
    path = write_zip(tmp_path, lambda members: members.__delitem__("depth/0007.png"))
    with pytest.raises(MetaVPTError, match=r"lacks depth/0007\.png"):
        open_nyuv2(path)
    path = write_zip(tmp_path)
    (tmp_path / "splits.json").write_text('{"train": [3, 7], "val": [7]}')
    with pytest.raises(MetaVPTError, match=r"splits\.json: 'train' and 'val'"):
        open_nyuv2(path)
    (tmp_path / "splits.json").unlink()
    with pytest.raises(MetaVPTError, match=r"splits\.json: must list"):
        open_nyuv2(path)
    path = write_zip(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MetaVPTError, match=rf"{ZIP_NAME}: not a readable zip"):
        open_nyuv2(path)


@pytest.mark.shared_data
def test_real_frames(shared_data: Path):
    frames = open_nyuv2(shared_data / "nyuv2")
    assert isinstance(frames, NYUv2Zip)
    assert (len(frames), frames.size, frames.num_classes) == (1122, (240, 320), 13)
    assert (len(frames.splits["train"]), len(frames.splits["val"])) == (795, 327)
    assert [frames.rows[i] for i in frames.splits["train"]] == official_train_rows()
    seen: set[int] = set()
    for i in frames.splits["val"][::40] + frames.splits["train"][::80]:
        frame = frames[i]
        assert frame.depth.min() > 0.7
        assert frame.depth.max() < 10
        seen |= set(frame.label.unique().tolist())
    assert (
        {IGNORE, frames.class_names.index("wall"), frames.class_names.index("floor")}
        <= seen
        <= {IGNORE, *range(13)}
    )


def overwrite(name: str, index: tuple, value: float, dtype: str) -> Callable[[h5py.File], None]:
    """Replace the dataset `name` by one of another type that holds `value` at `index`."""

    def change(file: h5py.File) -> None:
        array = np.asarray(file[name]).astype(dtype)
        array[index] = value
        del file[name]
        file[name] = array

    return change


@pytest.mark.parametrize("label", [-1, -5, len(NAMES) + 1])
def test_a_mat_label_outside_the_names_is_an_error(tmp_path: Path, label: int):
    write_mat(tmp_path / "n.mat", change=overwrite("labels", (0, 2, 3), label, "int16"))
    frames = open_nyuv2(tmp_path / "n.mat")
    assert frames[1].label.shape == SIZE
    with pytest.raises(MetaVPTError, match=f"frame 0 has label {label}"):
        frames[0]


def test_mat_labels_must_be_whole_numbers(tmp_path: Path):
    write_mat(tmp_path / "n.mat", change=overwrite("labels", (0, 0, 0), 1.5, "float32"))
    with pytest.raises(MetaVPTError, match="labels is float32"):
        open_nyuv2(tmp_path / "n.mat")


@pytest.mark.parametrize("depth", [1e300, -1e300, np.nan, np.inf])
def test_depth_that_float32_cannot_hold_is_unknown(tmp_path: Path, depth: float):
    write_mat(tmp_path / "n.mat", change=overwrite("depths", (0, 2, 3), depth, "float64"))
    frame = open_nyuv2(tmp_path / "n.mat")[0]
    assert frame.depth[3, 2] == 0
    assert torch.isfinite(frame.depth).all()
    assert int((frame.depth == 0).sum()) == 1


@pytest.mark.parametrize("shape", [(2, 3, 0, 0), (2, 3, 4, 0), (0, 3, 4, 4)])
def test_a_mat_without_pixels_is_an_error(tmp_path: Path, shape: tuple[int, ...]):
    def empty(file: h5py.File) -> None:
        for name, size in (
            ("images", shape),
            ("depths", (shape[0], *shape[2:])),
            ("labels", (shape[0], *shape[2:])),
        ):
            kind = file[name].dtype
            del file[name]
            file[name] = np.zeros(size, kind)

    write_mat(tmp_path / "n.mat", change=empty)
    with pytest.raises(MetaVPTError, match=r"n\.mat: images is"):
        open_nyuv2(tmp_path / "n.mat")
