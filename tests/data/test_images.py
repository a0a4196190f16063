import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from metavpt.data.images import FrameImages, open_images
from metavpt.data.nyuv2 import open_nyuv2
from metavpt.data.photo import decode, fit
from metavpt.errors import MetaVPTError

SIZE = (16, 20)


def picture(
    height: int = 24, width: int = 40, value: int | None = None, mode: str = "RGB"
) -> Image.Image:
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.full_like(array, value) if value is not None else array).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def test_folder_of_every_kind(tmp_path: Path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    kinds = {
        "a.jpg": "JPEG",
        "b.JPEG": "JPEG",
        "deep/c.png": "PNG",
        "deep/er/d.webp": "WEBP",
        "e.bmp": "BMP",
    }
    for k, (name, kind) in enumerate(kinds.items()):
        picture(value=40 * k).save(tmp_path / name, kind)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.jpg").write_bytes(b"left by macOS")
    images = open_images(tmp_path, SIZE)
    assert len(images) == 5  # type: ignore[arg-type]
    for k in range(5):
        assert images[k].shape == (3, *SIZE)
        assert images[k].dtype == torch.uint8
    assert sorted(round(float(images[k].float().mean()) / 40) for k in range(5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
def test_modes_become_rgb(mode: str):
    image = picture(value=255).convert(mode)
    tensor = decode(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), "x")
    assert tensor.shape == (3, 24, 40)
    assert int(tensor.min()) == 255


def test_16_bits_are_scaled_not_clipped():
    levels = np.array([[0, 257, 200 * 257, 65535]], np.uint16)
    assert decode(encoded(Image.fromarray(levels)), "x")[1, 0].tolist() == [0, 1, 200, 255]


def test_fit_covers_and_crops_the_centre():
    ramp = torch.arange(40, dtype=torch.uint8).expand(3, 20, 40)
    assert fit(ramp, (20, 20))[0, 0].tolist() == list(range(10, 30))
    assert torch.equal(fit(ramp, (20, 40)), ramp)
    assert fit(ramp, (50, 33)).shape == (3, 50, 33)
    half = fit(ramp, (10, 20))[0, 5].float()
    torch.testing.assert_close(
        half[1:-1], torch.arange(40).view(20, 2).float().mean(1)[1:-1], atol=1.0, rtol=0
    )


def test_zip(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        archive.writestr("b/two.png", encoded(picture(value=200)))
        archive.writestr("a/one.jpg", encoded(picture(value=10), "JPEG"))
        archive.writestr("__MACOSX/._one.jpg", b"")
        archive.writestr("readme.txt", b"")
    for path in (tmp_path / "i.zip", tmp_path):  # the folder holds nothing else
        images = open_images(path, SIZE)
        assert len(images) == 2  # type: ignore[arg-type]
        assert [round(float(images[k].float().mean()), -1) for k in range(2)] == [10, 200]


def test_npz_of_arrays_and_of_jpegs(tmp_path: Path):
    arrays = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "arrays.npz", images=arrays)
    images = open_images(tmp_path / "arrays.npz", SIZE)
    assert all((images[k].permute(1, 2, 0).numpy() == arrays[k]).all() for k in range(3))
    jpegs = [encoded(picture(value=60 * k), "JPEG") for k in range(4)]
    offsets = np.cumsum([0, *map(len, jpegs)])
    joined = np.frombuffer(b"".join(jpegs), np.uint8)
    np.savez(
        tmp_path / "jpegs.npz", jpeg=joined, offsets=offsets, split=np.array([0, 1, 0, 0], np.uint8)
    )
    images = open_images(tmp_path / "jpegs.npz", SIZE)
    assert [round(float(images[k].float().mean()) / 60) for k in range(len(images))] == [0, 2, 3]


def test_frame_images(tmp_path: Path):
    frames = open_nyuv2(None, rooms={"folder": tmp_path, "num_frames": 5, "size": (24, 32)})
    images = FrameImages(frames, [4, 1], (24, 32))
    assert len(images) == 2
    assert torch.equal(images[0], frames[4].image)
    assert torch.equal(FrameImages(frames, [4, 1], SIZE)[1], fit(frames[1].image, SIZE))


def test_bad_sources(tmp_path: Path):
    def message(path: Path) -> str:
        with pytest.raises(MetaVPTError) as raised:
            open_images(path, SIZE)[0]
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "data.unlabelled" in message(tmp_path / "gone")
    assert "holds no image" in message(tmp_path)
    (tmp_path / "text.dat").write_text("text")
    assert "text.dat: neither a folder nor a readable zip" in message(tmp_path / "text.dat")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme.txt", b"")
    assert "empty.zip: the zip holds no image" in message(tmp_path / "empty.zip")
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("a/broken.png", encoded(picture())[:200])
    assert "bad.zip: a/broken.png" in message(tmp_path / "bad.zip")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "broken.jpg").write_bytes(b"\xff\xd8 not a jpeg")
    assert "broken.jpg: not a readable image" in message(tmp_path / "folder")


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"pixels": np.zeros(3)}, "needs an array `images`"),
        ({"images": np.zeros((2, 8, 8, 3))}, "images is float64"),
        ({"images": np.zeros((2, 8, 8), np.uint8)}, r"images is uint8 \(2, 8, 8\)"),
        ({"images": np.array([{}])}, "not a readable npz"),
        ({"jpeg": np.zeros(9, np.uint8), "offsets": np.array([0, 9])}, "image 0"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], text: str):
    np.savez(tmp_path / "i.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(MetaVPTError, match=rf"i\.npz: .*{text}"):
        open_images(tmp_path / "i.npz", SIZE)[0]


@pytest.mark.parametrize("keep", [0, 100, -50])
def test_a_cut_off_npz(tmp_path: Path, keep: int):
    np.savez(tmp_path / "i.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    data = (tmp_path / "i.npz").read_bytes()
    (tmp_path / "i.npz").write_bytes(data[:keep])
    with pytest.raises(MetaVPTError, match=r"i\.npz: not a readable npz"):
        open_images(tmp_path / "i.npz", SIZE)


@pytest.mark.shared_data
def test_real_images(shared_data: Path):
    tiny, imagenet = (
        open_images(shared_data / "tiny_imagenet", (64, 64)),
        open_images(shared_data / "imagenet_sample", (96, 128)),
    )
    assert (len(tiny), len(imagenet)) == (10000, 1000)  # type: ignore[arg-type]
    assert torch.stack([tiny[k] for k in range(0, 10000, 200)]).shape == (50, 3, 64, 64)
    assert imagenet[999].shape == (3, 96, 128)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": np.zeros(3)}, "needs an array `images`"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, r"images is uint8 \(2, 4, 4\)"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "images is float32"),
        (
            {"images": np.zeros((2, 4, 4, 3), np.uint8), "split": np.zeros(3)},
            r"split is \(3,\).*the 2 images",
        ),
        ({"jpeg": np.zeros(9, np.uint8), "offsets": np.array([0.0, 9.0])}, "offsets whole numbers"),
        (
            {"jpeg": np.zeros(9, np.uint8), "offsets": np.array([0, 5, 4])},
            "must rise from 0 to at most the 9 bytes",
        ),
        (
            {"jpeg": np.zeros(9, np.uint8), "offsets": np.array([0, 10])},
            "must rise from 0 to at most the 9 bytes",
        ),
    ],
)
def test_arrays_that_hold_no_images_are_named(
    tmp_path: Path, arrays: dict[str, np.ndarray], words: str
):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(MetaVPTError, match=rf"a\.npz: .*{words}"):
        open_images(tmp_path / "a.npz", SIZE)


def test_an_image_that_went_away_is_named(tmp_path: Path):
    picture().save(tmp_path / "a.png")
    images = open_images(tmp_path, SIZE)
    (tmp_path / "a.png").unlink()
    with pytest.raises(MetaVPTError, match=r"a\.png: cannot be read \(No such file"):
        images[0]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.png", encoded(picture()))
    zipped = open_images(tmp_path / "a.zip", SIZE)
    zipped.members.append("b.png")  # type: ignore[attr-defined]
    with pytest.raises(MetaVPTError, match=r"a\.zip: the zip lacks b\.png"):
        zipped[1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(kind: str, orientation: int):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = io.BytesIO()
    picture(24, 40).save(data, kind, exif=exif)
    stored = Image.open(io.BytesIO(data.getvalue()))
    upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert (decode(data.getvalue(), "x").permute(1, 2, 0).numpy() == upright).all()
    as_stored = decode(data.getvalue(), "x", upright=False)
    assert (as_stored.permute(1, 2, 0).numpy() == np.asarray(stored.convert("RGB"))).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_are_ignored():
    data = io.BytesIO()
    picture(24, 40).save(data, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data.getvalue(), "x").shape == (3, 24, 40)


@pytest.mark.parametrize("size", [(0, 0), (0, 4), (4, 0)])
def test_images_without_pixels_are_an_error(tmp_path: Path, size: tuple[int, int]):
    np.savez(tmp_path / "i.npz", images=np.zeros((2, *size, 3), np.uint8))
    with pytest.raises(MetaVPTError, match=r"i\.npz: images is uint8 \(2, "):
        open_images(tmp_path / "i.npz", SIZE)
