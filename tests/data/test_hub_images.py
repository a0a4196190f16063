"""Hugging Face data sets of images as unlabelled streams."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from metavpt.data.images import HubImages, open_images
from metavpt.data.photo import fit
from metavpt.errors import MetaVPTError

datasets: Any = pytest.importorskip("datasets")
pa: Any = pytest.importorskip("pyarrow")

SIZE = (16, 24)
PIXELS = np.random.default_rng(0).integers(0, 255, (6, 20, 30, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def made(pixels: np.ndarray = PIXELS) -> Any:
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    columns = {"label": list(range(len(pixels))), "photo": [png(one) for one in pixels]}
    return datasets.Dataset.from_dict(columns, features=features)


def expected(index: int, pixels: np.ndarray = PIXELS) -> torch.Tensor:
    return fit(torch.from_numpy(pixels[index]).movedim(-1, 0), SIZE)


def test_a_saved_set_is_read_in_place_also_by_workers(tmp_path: Path) -> None:
    made().save_to_disk(tmp_path / "one")
    images = open_images(tmp_path / "one", SIZE)
    assert len(images) == 6  # type: ignore[arg-type]
    for index in (4, 0):
        assert torch.equal(images[index], expected(index))
    loader = DataLoader(images, batch_size=3, num_workers=1)
    assert torch.equal(torch.cat(list(loader)), torch.stack([expected(i) for i in range(6)]))


def test_the_train_split_or_the_only_one_is_taken(tmp_path: Path) -> None:
    parts = {"test": made(PIXELS[:2]), "train": made(PIXELS[2:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    images = open_images(tmp_path / "both", SIZE)
    assert len(images) == 4  # type: ignore[arg-type]
    assert torch.equal(images[0], expected(2))
    datasets.DatasetDict(test=parts["test"]).save_to_disk(tmp_path / "only")
    assert torch.equal(open_images(tmp_path / "only", SIZE)[1], expected(1))


def test_a_hub_name_is_asked_for_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, split: str | None) -> Any:
        asked.append((name, split))
        return made() if split else datasets.DatasetDict(train=made())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("hf:ann/photos", "hf:ann/photos:valid"):
        assert torch.equal(open_images(Path(source), SIZE)[3], expected(3))
    assert asked == [("ann/photos", None), ("ann/photos", "valid")]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    two = {name: made(PIXELS[:1]) for name in ("a", "b")}
    datasets.DatasetDict(two).save_to_disk(tmp_path / "two")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{")
    for name, words in (
        ("text", r"no column of images \(it has text\)"),
        ("two", "no split train, but a, b"),
        ("damaged", "damaged: the data set cannot be had"),
    ):
        with pytest.raises(MetaVPTError, match=words):
            open_images(tmp_path / name, SIZE)
    rows = [{"bytes": b"no image", "path": None}]
    broken = datasets.Dataset.from_dict({"photo": rows}, datasets.Features(photo=datasets.Image()))
    broken.save_to_disk(tmp_path / "broken")
    with pytest.raises(MetaVPTError, match="broken: image 0: not a readable image"):
        open_images(tmp_path / "broken", SIZE)[0]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made().select([]))
    with pytest.raises(MetaVPTError, match="hf:ann/photos: holds no image"):
        HubImages("hf:ann/photos", SIZE)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MetaVPTError, match="pip install datasets"):
        HubImages("hf:ann/photos", SIZE)


def named(folder: Path, path: str) -> Path:
    """A saved set of one image that is not held, but named by its path."""
    made(PIXELS[:1]).save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    with pa.OSFile(str(file)) as opened, pa.ipc.open_stream(opened) as stream:
        table = stream.read_all()
    column = table.schema.get_field_index("photo")
    rows = pa.array([{"bytes": None, "path": path}], table.schema.field("photo").type)
    table = table.set_column(column, table.schema.field(column), rows)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return folder


def test_a_row_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).save(tmp_path / "private.png")
    for k, path in enumerate((tmp_path / "private.png", tmp_path / "2" / ".." / "private.png")):
        with pytest.raises(MetaVPTError, match="outside of the data set"):
            open_images(named(tmp_path / f"{k}", str(path)), SIZE)[0]
    with pytest.raises(MetaVPTError, match="outside of the data set"):
        open_images(named(tmp_path / "device", "/dev/zero"), SIZE)[0]
    linked = named(tmp_path / "linked", str(tmp_path / "linked" / "a.png"))
    (linked / "a.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(MetaVPTError, match="outside of the data set"):
        open_images(linked, SIZE)[0]
    own = named(tmp_path / "own", str(tmp_path / "own" / "a.png"))
    Image.fromarray(PIXELS[0]).save(own / "a.png")
    assert torch.equal(open_images(own, SIZE)[0], expected(0))


def test_a_set_of_the_hub_may_name_files_of_its_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for place in (cache, tmp_path):
        Image.fromarray(PIXELS[0]).save(place / "a.png")
        found = datasets.load_from_disk(named(tmp_path / place.name, str(place / "a.png")))
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, found=found, **__: found)
        images = open_images(Path("hf:ann/photos"), SIZE)
        if place == cache:
            assert torch.equal(images[0], expected(0))
        else:
            with pytest.raises(MetaVPTError, match="outside of the data set"):
                images[0]
