"""Damaged files of every kind that is read: a MetaVPTError that names the file, or what could still be read; nothing else, and no hang.

METAVPT_FUZZ=900 pytest tests/data/test_fuzz.py      10,000 files and more; the default is few, and always the same ones
"""

import io
import json
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from metavpt import checkpoint
from metavpt.data.ade20k import read_annotation
from metavpt.data.classified import open_classified
from metavpt.data.gsm8k import read_word_problems
from metavpt.data.images import decode, open_images
from metavpt.data.nyuv2 import ZIP_NAME, open_nyuv2
from metavpt.data.revisited import open_revisited
from metavpt.data.text import open_documents
from metavpt.errors import MetaVPTError
from metavpt.learners.weights import _backbone, _read_file
from metavpt.report import read_log
from metavpt.runfolder import read_config
from metavpt.targets import check_targets
from metavpt.time_limit import time_limit

NUM_EXAMPLES = int(os.environ.get("METAVPT_FUZZ", "15"))
SECONDS, MIB = 20, 512  # what reading one file of a few kB may take at most
SETTINGS = settings(
    max_examples=NUM_EXAMPLES, deadline=None, derandomize=NUM_EXAMPLES < 100, database=None, suppress_health_check=list(HealthCheck)
)
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
    return {"jpeg": np.frombuffer(b"".join(images), np.uint8), "offsets": np.cumsum([0, *map(len, images)])}


def mat() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened["images"], opened["labels"] = pixels(4, 3, 8, 8), np.ones((4, 8, 8), "uint16")
        opened.create_dataset("depths", data=np.ones((4, 8, 8), "float32"), compression="gzip")
        opened["trainNdxs"], opened["testNdxs"] = np.array([[1.0, 2.0, 3.0]]), np.array([[4.0]])
        references = opened.create_dataset("names", (1, 2), h5py.ref_dtype)
        for i, name in enumerate(("wall", "floor")):
            references[0, i] = opened.create_dataset(f"#refs#/{i}", data=np.array([[ord(c)] for c in name], dtype="uint16")).ref
    return file.getvalue()


def nyu_zip() -> bytes:
    kinds = {"rgb": ("jpg", pixels(8, 8, 3), "JPEG"), "depth": ("png", pixels(8, 8), "PNG"), "label40": ("png", pixels(8, 8) % 40, "PNG")}
    return zipped({f"{kind}/{i:04d}.{end}": encoded(form, a) for i in (0, 1) for kind, (end, a, form) in kinds.items()})


def saved(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def tensors(folder: Path) -> bytes:
    save_file({"patch_embed.proj.weight": torch.ones(2, 3), "norm.weight": torch.ones(3)}, folder / "x")
    return (folder / "x").read_bytes()


STATE = {"random": 1, "problem": {"learner": {"weight": torch.ones(3, 4)}}, "streams": {"meta": {"epoch": 0, "position": 3}}}
GROUND = {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [{"bbx": [0.0, 1.0, 2.0, 3.0], "easy": [0], "hard": [1], "junk": []}]}
CONFIG = 'seed: 0\nproblem:\n  _target_: metavpt.problems.sources.Sources\n  sizes: [1, 2.5, "${seed}"]\ntrainer: {lr: 1e-3, x: null}\n'
ROWS = "".join(json.dumps({"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}) + "\n" for i in range(4))
LOG = "".join(json.dumps({"kind": "train", "step": i, "loss": 1 / (i + 1), "seconds": {"data": 1.0}}) + "\n" for i in range(4))


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


def read_run_config(path: Path) -> None:
    check_targets(read_config(path.parent))


# name: the file's name, a valid one, how it is read
READERS: dict[str, tuple[str, Callable[[Path], bytes], Callable[[Path], Any]]] = {
    "png": ("a.png", lambda _: encoded("PNG"), lambda path: decode(path.read_bytes(), str(path))),
    "jpeg": ("a.jpg", lambda _: encoded("JPEG"), lambda path: decode(path.read_bytes(), str(path))),
    "annotation": ("a.png", lambda _: encoded("PNG", pixels(8, 8) % 150), read_annotation),
    "zip": ("a.zip", lambda _: zipped({f"{i}.png": encoded("PNG") for i in range(3)}), lambda path: every(open_images(path, (8, 8)))),
    "npz": ("a.npz", lambda _: npz(images=pixels(4, 8, 8, 3)), lambda path: every(open_images(path, (8, 8)))),
    "npz of jpeg": ("a.npz", lambda _: npz(**joined()), lambda path: every(open_images(path, (8, 8)))),
    "classified": ("a.npz", lambda _: npz(**joined(), label=np.arange(4), split=np.array([0, 0, 1, 1])), read_classified),
    "mat": ("a.mat", lambda _: mat(), lambda path: every(open_nyuv2(path))),
    "frames": (ZIP_NAME, lambda _: nyu_zip(), read_splits),
    "jsonl": ("a.jsonl", lambda _: ROWS.encode(), lambda path: list(open_documents(path, {"answer": "answer", "question": ["question"]}))),
    "json": ("a.json", lambda _: f"[{ROWS.strip().replace(chr(10), ',')}]".encode(), lambda path: list(read_word_problems(path))),
    "jsonl, skipping": ("a.jsonl", lambda _: ROWS.encode(), lambda path: list(read_word_problems(path, on_error="skip"))),
    "text": ("a.txt", lambda _: "One é.\n\nTwo.".encode(), lambda path: list(open_documents(path))),
    "checkpoint": ("step-00000001.pt", lambda _: saved(STATE), checkpoint.read),
    "weights": ("a.pt", lambda _: saved({"patch_embed.proj.weight": torch.ones(2, 3)}), lambda path: _backbone(_read_file(path), path)),
    "safetensors": ("a.safetensors", tensors, lambda path: _backbone(_read_file(path), path)),
    "ground truth": ("gnd_x.pkl", lambda _: pickle.dumps(GROUND), lambda path: open_revisited(path.parent)),
    "config": ("config.yaml", lambda _: CONFIG.encode(), read_run_config),
    "log": ("metrics.jsonl", lambda _: LOG.encode(), read_log),
}

place = st.floats(0, 1, exclude_max=True)
Change = tuple[str, float, float, bytes]
changes = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "cut", "drop", "insert", "splice"]), place, place, st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


def damage(data: bytes, change: list[Change]) -> bytes:
    for kind, first, second, junk in change:
        at, to = sorted((int(first * len(data)), int(second * len(data))))
        data = {
            "flip": lambda: data[:at] + bytes([data[at] ^ (1 << junk[0] % 8)]) + data[at + 1 :] if data else data,  # noqa: B023
            "set": lambda: data[:at] + junk + data[at + len(junk) :],  # noqa: B023
            "cut": lambda: data[:to],  # noqa: B023
            "drop": lambda: data[:at] + data[min(to, at + 64) :],  # noqa: B023
            "insert": lambda: data[:at] + junk + data[at:],  # noqa: B023
            "splice": lambda: data[:at] + data[to:] + data[at:to],  # noqa: B023
        }[kind]()
    return data


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def complaint(read: Callable[[Path], Any], path: Path) -> str:
    """The error that the user sees, none where the file could be read."""
    try:
        with time_limit(SECONDS, "HANGS"):
            read(path)
    except MetaVPTError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_a_clear_error_or_is_read(reader: str, tmp_path: Path):
    name, make, read = READERS[reader]
    whole, path = make(tmp_path), tmp_path / "file" / name
    path.parent.mkdir()
    path.write_bytes(whole)
    read(path)  # the whole file is valid, so whatever fails below fails by the damage

    @given(change=changes)
    @settings(SETTINGS)
    def fuzz(change: list[Change]) -> None:
        path.write_bytes(damage(whole, change))
        message = complaint(read, path)
        assert "HANGS" not in message
        assert not message or path.name in message or str(path.parent) in message or "_target_" in message

    before = peak()
    fuzz()
    assert peak() - before < MIB


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
    data = bytearray(encoded("PNG"))
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    with pytest.raises(MetaVPTError, match=r"a\.png: not a readable image"):
        decode(bytes(data), "a.png")


class Malicious:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("harm",))


@pytest.mark.parametrize("reader", ["checkpoint", "weights", "ground truth"])
def test_a_pickle_that_brings_code_is_refused(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    name, _, read = READERS[reader]
    for data in (pickle.dumps(Malicious()), saved({"random": Malicious()})):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MetaVPTError, match=name.replace(".", r"\.")):
            read(tmp_path / name)
    assert not (tmp_path / "harm").exists()
