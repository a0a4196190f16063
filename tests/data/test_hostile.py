"""Hostile data: files that lead elsewhere, declare more than they hold, or never end."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.damaged import MIB, growth
from PIL import Image

from metavpt.data.ade20k import ADE20K
from metavpt.data.classified import open_classified
from metavpt.data.images import open_images
from metavpt.data.loader import Readable, Skips
from metavpt.data.nyuv2 import open_nyuv2
from metavpt.data.photo import decode, fit
from metavpt.errors import MetaVPTError
from metavpt.report.gallery import gallery
from metavpt.training.streams import time_limit

SPARE = 64 * MIB  # what SECURITY.md allows beside twice what a file holds
SIZE = (96, 128)


def refusal(read: Callable[[], Any], spare: float = SPARE) -> str:
    """The message that `read` ends with, in a minute and within `spare` bytes."""
    said: list[str] = []

    def call() -> None:
        with time_limit(60, "HANGS"), pytest.raises(MetaVPTError) as caught:
            read()
        said.append(str(caught.value))

    grown = growth(call)
    assert said != ["HANGS"]
    assert grown < spare, f"{grown / MIB:.0f} MiB"
    return said[0]


def every(items: Any) -> list[Any]:
    return [items[index] for index in range(len(items))]


# HDF5


def write_mat(path: Path, leave_out: str = "") -> h5py.File:
    """A good file of 4 frames, open, without one of its datasets."""
    file = h5py.File(path, "w")
    arrays = {
        "images": np.zeros((4, 3, 8, 8), "uint8"),
        "depths": np.ones((4, 8, 8), "float32"),
        "labels": np.ones((4, 8, 8), "uint16"),
        "trainNdxs": np.array([[1.0, 2.0, 3.0]]),
        "testNdxs": np.array([[4.0]]),
    }
    for name, array in arrays.items():
        if name != leave_out:
            file[name] = array
    if leave_out != "names":
        letters = file.create_dataset("wall", data=np.array([[ord(c)] for c in "wall"], "uint16"))
        file.create_dataset("names", (1, 1), h5py.ref_dtype)[0, 0] = letters.ref
    return file


def test_the_good_file_is_read(tmp_path):
    write_mat(tmp_path / "a.mat").close()
    assert len(every(open_nyuv2(tmp_path / "a.mat"))) == 4


@pytest.fixture
def private(tmp_path) -> Path:
    """A file of the machine, and its bytes as the frames of a good file elsewhere."""
    (tmp_path / "private").write_bytes(b"swordfish" * 100)
    write_mat(tmp_path / "other.mat").close()
    return tmp_path / "private"


def external_storage(file: h5py.File, private: Path) -> None:
    file.create_dataset("images", (4, 3, 8, 8), "uint8", external=[(str(private), 0, 768)])


def external_link(file: h5py.File, private: Path) -> None:
    file["images"] = h5py.ExternalLink(str(private.with_name("other.mat")), "images")


def link_through_a_link(file: h5py.File, private: Path) -> None:
    file["elsewhere"] = h5py.ExternalLink(str(private.with_name("other.mat")), "/")
    file["images"] = h5py.SoftLink("/elsewhere/images")


def virtual_dataset(file: h5py.File, private: Path) -> None:
    layout = h5py.VirtualLayout((4, 3, 8, 8), "uint8")
    layout[:] = h5py.VirtualSource(str(private.with_name("other.mat")), "images", (4, 3, 8, 8))
    file.create_virtual_dataset("images", layout)


def letters_elsewhere(file: h5py.File, private: Path) -> None:
    letters = file.create_dataset("letters", (9,), "uint8", external=[(str(private), 0, 9)])
    file.create_dataset("names", (1, 1), h5py.ref_dtype)[0, 0] = letters.ref


def rows_elsewhere(file: h5py.File, private: Path) -> None:
    file.create_dataset("trainNdxs", (1, 1), "uint8", external=[(str(private), 0, 1)])


LEADS_AWAY = {
    external_storage: "images", external_link: "images", link_through_a_link: "images",
    virtual_dataset: "images", letters_elsewhere: "names", rows_elsewhere: "trainNdxs",
}  # fmt: skip


@pytest.mark.parametrize("put", LEADS_AWAY, ids=lambda put: put.__name__)
def test_hdf5_that_leads_to_other_files_is_refused(put, tmp_path, private):
    path = tmp_path / "a.mat"
    with write_mat(path, leave_out=LEADS_AWAY[put]) as file:
        put(file, private)
    said = refusal(lambda: open_nyuv2(path))
    assert str(path) in said
    assert "other files" in said


def declared(
    name: str, shape: tuple[int, ...], kind: str, **options: Any
) -> Callable[[h5py.File], None]:
    def put(file: h5py.File) -> None:
        file.create_dataset(name, shape, kind, **options)

    put.__name__ = f"{name}-{'x'.join(map(str, shape))}"
    return put


def letters_without_end(file: h5py.File) -> None:
    """Two thousand references to one name, which is declared only."""
    letters = file.create_dataset("letters", (2**30,), "uint8", chunks=(2**20,))
    names = file.create_dataset("names", (1, 2000), h5py.ref_dtype)
    names[0] = [letters.ref] * 2000


def a_chunk_of_everything(file: h5py.File) -> None:
    """Deflated to nothing, and unpacked as a whole for each frame."""
    shape = (4, 3, 2600, 2600)
    file.create_dataset("images", shape, "uint8", chunks=shape, compression="gzip")
    file["images"][0, 0, 0, 0] = 1
    for name in ("depths", "labels"):
        file.create_dataset(name, (4, 2600, 2600), "uint8", chunks=(1, 100, 100))


DECLARED = [
    ("images", declared("images", (10, 3, 20_000, 20_000), "uint8", chunks=(1, 1, 100, 100))),
    ("images", declared("images", (10, 3, 20_000, 20_000), "uint8")),
    ("images", declared("images", (2_000_000_000, 3, 1, 1), "uint8", chunks=(1000, 3, 1, 1))),
    ("trainNdxs", declared("trainNdxs", (1, 2_000_000_000), "float64", chunks=(1, 1000))),
    ("trainNdxs", declared("trainNdxs", (1, 5_000_000), "uint8")),
    ("names", declared("names", (1, 1_000_000_000), h5py.ref_dtype, chunks=(1, 1000))),
    ("names", declared("names", (1, 1_000_000), h5py.ref_dtype)),
    ("names", letters_without_end),
    ("images", a_chunk_of_everything),
]


@pytest.mark.parametrize(
    ("name", "put"), DECLARED, ids=lambda value: getattr(value, "__name__", "")
)
def test_hdf5_that_declares_more_than_it_holds_is_refused(name, put, tmp_path):
    path = tmp_path / "a.mat"
    with write_mat(path, leave_out=name) as file:
        if name == "images":
            del file["depths"], file["labels"]
        put(file)
        if "depths" not in file:
            frames, _, *sides = file["images"].shape
            for other in ("depths", "labels"):
                chunks = (1, *(min(side, 100) for side in sides))
                file.create_dataset(other, (frames, *sides), "uint8", chunks=chunks)
    said = refusal(lambda: every(open_nyuv2(path)))
    assert str(path) in said


# tar


def negative_header() -> bytes:
    """The next member begins where this one does."""
    member = tarfile.TarInfo("a.png")
    member.size = -512
    return member.tobuf(tarfile.GNU_FORMAT)


def negative_record() -> bytes:
    member = tarfile.TarInfo("a.png")
    member.pax_headers = {"size": "-1536"}  # its header, the record, its own header
    return member.tobuf(tarfile.PAX_FORMAT)


@pytest.mark.parametrize("make", [negative_header, negative_record])
def test_a_tar_with_a_negative_size_ends(make, tmp_path, monkeypatch):
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.tar").write_bytes(tarfile.TarInfo("first").tobuf() + make() + bytes(10_240))
    assert "negative size" in refusal(lambda: open_images(tmp_path / "a.tar", SIZE))


# Images


def encoded(size: tuple[int, int], kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(60_000, 2), (2, 60_000), (4_000_000, 1), (1, 4_000_000)])
def test_a_strip_is_scaled_within_little_memory(size, tmp_path):
    data, found = encoded(size), []
    grown = growth(lambda: found.append(fit(decode(data, "a.png"), SIZE)))
    assert grown < 8 * size[0] * size[1] + SPARE
    assert found[0].shape == (3, *SIZE)
    assert found[0].flatten(1).unique(dim=1).tolist() == [[10], [20], [30]]


def test_a_strip_of_ade20k_is_scaled_within_little_memory(tmp_path):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        Image.new("RGB", (200_000, 16)).save(tmp_path / "images" / split / "a.jpg", "PNG")
        Image.new("L", (200_000, 16), 7).save(tmp_path / "annotations" / split / "a.png")
    frames, found = ADE20K(tmp_path, (256, 256)), []
    assert growth(lambda: found.append(frames[0])) < SPARE + 8 * 200_000 * 16
    assert found[0].label.unique().tolist() == [6]


@pytest.mark.parametrize("size", [(300, 400), (1000, 200), (97, 129), (90, 500), (3000, 2500)])
def test_other_images_are_scaled_as_before(size):
    """The whole image by one call, and then cut."""
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    factor = max(SIZE[0] / size[0], SIZE[1] / size[1])
    scaled = [max(side, round(length * factor)) for side, length in zip(SIZE, size, strict=True)]
    whole = F.interpolate(image[None].double(), scaled, mode="bilinear", antialias=True)[0]
    top, left = (scaled[0] - SIZE[0]) // 2, (scaled[1] - SIZE[1]) // 2
    expected = whole[:, top : top + SIZE[0], left : left + SIZE[1]]
    rounding = 255 * max(size) * 2**-22  # of places in the image, which are float32
    assert (fit(image, SIZE).double() - expected).abs().max() < 0.5 + rounding


def test_a_webp_that_unpacks_to_gigabytes_is_refused():
    data = encoded((10_000, 8_000), "WEBP", lossless=True, method=0) + bytes(178_000)
    said = refusal(lambda: decode(data, "a.webp"))
    assert "a.webp: not a readable image (10000x8000 pixels are more than" in said


def test_only_formats_of_photographs_are_opened(tmp_path):
    """PIL would hand an EPS to Ghostscript, whatever its name says."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for data in (script, encoded((8, 8), "TIFF"), encoded((8, 8), "PPM")):
        assert "of no known format" in refusal(lambda data=data: decode(data, "a.jpg"))
        (tmp_path / "depth-step1.png").write_bytes(data)
        assert gallery(tmp_path).groups == {}


def test_an_image_that_cannot_be_read_is_skipped_whatever_is_wrong_with_it(tmp_path):
    names = {
        "a.png": encoded((1, 4_000_000)),
        "b.png": encoded((5000, 5000)),
        "c.webp": encoded((3000, 3000), "WEBP", lossless=True, method=0),
        "d.png": b"noise",
    }
    for name, data in names.items():
        (tmp_path / name).write_bytes(data)
    skips = Skips()
    images = Readable(open_images(tmp_path, SIZE), skips)
    for index in range(4):
        assert images[index].shape == (3, *SIZE)
    assert skips.total > 0


# Archives


def packed(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return path


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_an_npz_that_unpacks_to_gigabytes_is_refused(tmp_path):
    small = {"label.npy": np.zeros(2000, int), "split.npy": np.arange(2000) % 2}
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w") as member:
            shape = {"descr": "|u1", "fortran_order": False, "shape": (2000, 256, 256, 3)}
            np.lib.format.write_array_header_1_0(member, shape)
            for _ in range(2000):
                member.write(bytes(256 * 256 * 3))
        for name, array in small.items():
            archive.writestr(name, npy(array))
    assert path.stat().st_size < 2 * MIB
    for open_it in (open_images, open_classified):
        said = refusal(lambda open_it=open_it: open_it(path, SIZE))
        assert said.startswith(f"{path}: unpacks to 375 MiB")


def test_what_an_array_declares_beyond_its_bytes_is_not_taken(tmp_path):
    file = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 256, 256, 3)}
    np.lib.format.write_array_header_1_0(file, shape)
    path = packed(tmp_path / "a.npz", images_npy=file.getvalue() + bytes(100))
    assert str(path) in refusal(lambda: open_images(path, SIZE))


def test_a_member_that_unpacks_to_far_more_than_it_holds_is_refused(tmp_path):
    path = packed(tmp_path / "a.zip", a_png=bytes(200 * MIB))
    assert "unpacks to 200 MiB" in refusal(lambda: every(open_images(path, SIZE)))
