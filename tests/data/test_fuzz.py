"""Damaged data of every kind: a MetaVPTError that names the file, or a partial result; no hang."""

import io
import json
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers.damaged import SPARE, Reader, assert_survives, growth_alone
from PIL import Image

from metavpt.data.ade20k import read_annotation
from metavpt.data.classified import open_classified
from metavpt.data.gsm8k import read_word_problems
from metavpt.data.images import decode, open_images
from metavpt.data.nyuv2 import ZIP_NAME, open_nyuv2
from metavpt.data.revisited import open_revisited
from metavpt.data.text import open_documents
from metavpt.data.tokenizer import load_tokenizer, train_tokenizer
from metavpt.errors import MetaVPTError

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def encoded(format: str, array: np.ndarray | None = None) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(8, 8, 3) if array is None else array).save(file, format)
    return file.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def joined() -> dict[str, np.ndarray]:
    images = [encoded("JPEG") for _ in range(4)]
    return {
        "jpeg": np.frombuffer(b"".join(images), np.uint8),
        "offsets": np.cumsum([0, *map(len, images)]),
    }


def mat() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened["images"], opened["labels"] = pixels(4, 3, 8, 8), np.ones((4, 8, 8), "uint16")
        opened.create_dataset("depths", data=np.ones((4, 8, 8), "float32"), compression="gzip")
        opened["trainNdxs"], opened["testNdxs"] = np.array([[1.0, 2.0, 3.0]]), np.array([[4.0]])
        references = opened.create_dataset("names", (1, 2), h5py.ref_dtype)
        for i, name in enumerate(("wall", "floor")):
            references[0, i] = opened.create_dataset(
                f"#refs#/{i}", data=np.array([[ord(c)] for c in name], dtype="uint16")
            ).ref
    return file.getvalue()


def nyu_zip() -> bytes:
    kinds = {
        "rgb": ("jpg", pixels(8, 8, 3), "JPEG"),
        "depth": ("png", pixels(8, 8), "PNG"),
        "label40": ("png", pixels(8, 8) % 40, "PNG"),
    }
    return zipped(
        {
            f"{kind}/{i:04d}.{end}": encoded(form, a)
            for i in (0, 1)
            for kind, (end, a, form) in kinds.items()
        }
    )


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for k in range(3):
            member, data = tarfile.TarInfo(f"{k}.png"), encoded("PNG")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def tokenizer(folder: Path) -> bytes:
    """tokenizer.json; what else belongs to it lies in the folder."""
    train_tokenizer(["One and one is two."] * 9, 262, folder.parent / "tokenizers")
    (kept,) = (folder.parent / "tokenizers").iterdir()
    for file in kept.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return (kept / "tokenizer.json").read_bytes()


def tokenizer_config(folder: Path) -> bytes:
    tokenizer(folder)
    return (folder / "tokenizer_config.json").read_bytes()


def splits(folder: Path) -> bytes:
    (folder / ZIP_NAME).write_bytes(nyu_zip())
    return b'{"train": [0], "val": [1]}'


GROUND = {
    "imlist": ["a", "b"],
    "qimlist": ["q"],
    "gnd": [{"bbx": [0.0, 1.0, 2.0, 3.0], "easy": [0], "hard": [1], "junk": []}],
}
ROWS = "".join(
    json.dumps({"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"})
    + "\n"
    for i in range(4)
)


FIELDS = {"answer": "answer", "question": ["question"]}


def every(items: Any) -> None:
    for index in range(len(items)):
        items[index]


def read_splits(path: Path) -> None:
    (path.parent / "splits.json").write_text('{"train": [0], "val": [1]}')
    every(open_nyuv2(path))


def read_classified(path: Path) -> None:
    found = open_classified(path, (8, 8))
    every(found.train.images)
    every(found.val.images)


READERS = {
    "png": Reader(
        "a.png", lambda _: encoded("PNG"), lambda path: decode(path.read_bytes(), str(path))
    ),
    "jpeg": Reader(
        "a.jpg", lambda _: encoded("JPEG"), lambda path: decode(path.read_bytes(), str(path))
    ),
    "webp": Reader(
        "a.webp", lambda _: encoded("WEBP"), lambda path: decode(path.read_bytes(), str(path))
    ),
    "annotation": Reader("a.png", lambda _: encoded("PNG", pixels(8, 8) % 150), read_annotation),
    "zip": Reader(
        "a.zip",
        lambda _: zipped({f"{i}.png": encoded("PNG") for i in range(3)}),
        lambda path: every(open_images(path, (8, 8))),
    ),
    "tar": Reader("a.tar", lambda _: tar(), lambda path: every(open_images(path, (8, 8)))),
    "npz": Reader(
        "a.npz",
        lambda _: npz(images=pixels(4, 8, 8, 3)),
        lambda path: every(open_images(path, (8, 8))),
    ),
    "npz of jpeg": Reader(
        "a.npz", lambda _: npz(**joined()), lambda path: every(open_images(path, (8, 8)))
    ),
    "classified": Reader(
        "a.npz",
        lambda _: npz(**joined(), label=np.arange(4), split=np.array([0, 0, 1, 1])),
        read_classified,
    ),
    "mat": Reader("a.mat", lambda _: mat(), lambda path: every(open_nyuv2(path))),
    "frames": Reader(ZIP_NAME, lambda _: nyu_zip(), read_splits),
    "splits": Reader("splits.json", splits, lambda path: every(open_nyuv2(path.parent))),
    "jsonl": Reader(
        "a.jsonl", lambda _: ROWS.encode(), lambda path: list(open_documents(path, FIELDS))
    ),
    "json": Reader(
        "a.json",
        lambda _: f"[{ROWS.strip().replace(chr(10), ',')}]".encode(),
        lambda path: list(read_word_problems(path)),
    ),
    "jsonl, skipping": Reader(
        "a.jsonl",
        lambda _: ROWS.encode(),
        lambda path: list(read_word_problems(path, on_error="skip")),
        refuses=False,  # lines that cannot be read are passed over
    ),
    "text": Reader(
        "a.txt", lambda _: "One é.\n\nTwo.".encode(), lambda path: list(open_documents(path))
    ),
    "ground truth": Reader(
        "gnd_x.pkl", lambda _: pickle.dumps(GROUND), lambda path: open_revisited(path.parent)
    ),
    "tokenizer": Reader(
        "tokenizer.json", tokenizer, lambda path: load_tokenizer(path.parent)("One and 2.")
    ),
    "tokenizer_config": Reader(
        "tokenizer_config.json",
        tokenizer_config,
        lambda path: load_tokenizer(path.parent)("One and 2."),
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_a_clear_error_or_is_read(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "cache"))
    assert_survives(READERS[reader], tmp_path)


SIDE = 2500  # pixels: 25 MB as Pillow holds them, 4 bytes each
DECODE, DOCUMENTS = "decode(path.read_bytes(), str(path))", "list(open_documents(path))"
LONG = json.dumps({"text": "word " * 20_000}).encode()
# the file's name; its bytes; what reads it; how
LARGE: dict[str, tuple[str, Callable[[], bytes], str, str]] = {
    "png": ("a.png", lambda: encoded("PNG", smooth()), "metavpt.data.images import decode", DECODE),
    "jpeg": (
        "a.jpg",
        lambda: encoded("JPEG", smooth()),
        "metavpt.data.images import decode",
        DECODE,
    ),
    "16 bits": (
        "a.png",
        lambda: encoded("PNG", smooth()[..., 0] * np.uint16(257)),
        "metavpt.data.images import decode",
        DECODE,
    ),
    "npz": (
        "a.npz",
        lambda: npz(images=smooth()[None]),
        "metavpt.data.images import open_images",
        "open_images(path, (8, 8)).arrays",
    ),
    "json": (
        "a.json",
        lambda: b"[" + b", ".join([LONG] * 300) + b"]",
        "metavpt.data.text import open_documents",
        DOCUMENTS,
    ),
    "jsonl": (
        "a.jsonl",
        lambda: (LONG + b"\n") * 300,
        "metavpt.data.text import open_documents",
        DOCUMENTS,
    ),
}


def smooth() -> np.ndarray:
    """A photograph's kind of pixels, uint8 (SIDE, SIDE, 3)."""
    ramp = np.arange(SIDE)
    return np.stack([(ramp[:, None] * k + ramp) // 20 % 256 for k in (1, 2, 3)], -1).astype(
        np.uint8
    )


@pytest.mark.parametrize("reader", LARGE)
def test_reading_takes_at_most_twice_what_the_file_holds(reader: str, tmp_path: Path):
    name, make, imports, read = LARGE[reader]
    path = tmp_path / name
    path.write_bytes(make())
    grown, found = growth_alone(f"from {imports}", read, path)
    holds = max(path.stat().st_size, 4 * SIDE**2 if reader in ("png", "jpeg", "16 bits") else found)
    assert grown < 2 * holds + SPARE / 8, f"{grown / 1e6:.0f} MB for {holds / 1e6:.0f}"


HOSTILE = {"../outside.png", "/tmp/outside.png", "a/../../outside.png"}


def test_members_of_an_archive_stay_inside(tmp_path: Path):
    """Whatever they are called: they are read in place, and nothing is written."""
    path = tmp_path / "in" / "a.zip"
    path.parent.mkdir()
    path.write_bytes(zipped(dict.fromkeys(HOSTILE, encoded("PNG"))))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    every(open_images(path, (8, 8)))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before


def test_a_small_file_cannot_ask_for_a_large_memory(tmp_path: Path):
    bomb = tmp_path / "bomb.zip"
    bomb.write_bytes(zipped({"a.png": bytes(2**29)}))
    with pytest.raises(MetaVPTError, match="unpacks to 512 MiB"):
        every(open_images(bomb, (8, 8)))
    for side in (11_000, 4_000):  # more than any image; more than so few bytes can hold
        data = bytearray(encoded("PNG"))
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        with pytest.raises(
            MetaVPTError, match=rf"a\.png: not a readable image \({side}x{side} pixels are more"
        ):
            decode(bytes(data), "a.png")


class Malicious:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("harm",))


def test_a_ground_truth_that_brings_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gnd_x.pkl").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(MetaVPTError, match=r"gnd_x\.pkl"):
        open_revisited(tmp_path)
    assert not (tmp_path / "harm").exists()
