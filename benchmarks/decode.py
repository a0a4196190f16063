"""Images per second that the loader reads, decodes, fits and augments, by number of workers.

    python benchmarks/decode.py [--rounds 2] [--threads 2] [--rows shards/0 shards/2 ...]

Writes benchmarks/results/decode.json and its section of docs/benchmarks.md.
"""

import io
import itertools
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from rounds import Part, Row, cells, machine

from metavpt.data.images import open_images
from metavpt.data.loader import Batch, ImageLoader
from metavpt.designers.views import MultiCrop
from metavpt.learners.vit import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

PHOTO, SIZE, BATCH = (
    (375, 500),
    (256, 256),
    32,
)  # pixels of ImageNet's usual photograph, and of what the stream gives
NUM_SHARDS, PER_SHARD, CYCLE = 4, 32, 4
WORKERS = (0, 1, 2, 4)


def photo(seed: int) -> bytes:
    """A JPEG of cloudy colours, about as large as a photograph's."""
    rng = torch.Generator().manual_seed(seed)
    octaves = [
        F.interpolate(torch.rand(1, 3, n, n, generator=rng), PHOTO, mode="bicubic")
        for n in (4, 16, 64, 128)
    ]
    pixels = (sum(octaves)[0] / len(octaves) * 255).clamp(0, 255).byte()  # type: ignore[index]
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=90)
    return file.getvalue()


def write(kind: str, folder: Path) -> None:
    """The same images as tar shards or as files of a folder."""
    for shard in range(NUM_SHARDS):
        names = {f"{shard:03d}-{k:04d}.jpg": photo(shard * PER_SHARD + k) for k in range(PER_SHARD)}
        if kind == "folder":
            for name, data in names.items():
                (folder / name).write_bytes(data)
            continue
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for name, data in names.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


class Reading:
    """A batch a call."""

    def __init__(self, kind: str, num_workers: int, augment: bool) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="metavpt-decode-")  # as long as this lives
        write(kind, Path(self.folder.name))
        images = open_images(Path(self.folder.name), SIZE)
        self.batches: Iterator[Batch] = iter(ImageLoader(images, BATCH, 0, num_workers))
        self.recipe = MultiCrop(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if augment else None

    def __call__(self) -> Any:
        batch = next(self.batches)
        return self.recipe(batch.images, batch.seed) if self.recipe else batch


def row(kind: str, num_workers: int, augment: bool) -> Row:
    title = f"{kind}, {num_workers} workers" + (", then 2 + 6 crops" if augment else "")
    prepare: Callable[[], Any] = lambda: Reading(kind, num_workers, augment)  # noqa: E731
    return Row(title, prepare, cycle=CYCLE, least=1, most=4)


ROWS = {
    f"{kind}{'_crops' if augment else ''}/{workers}": row(kind, workers, augment)
    for kind, workers, augment in itertools.product(("shards", "folder"), WORKERS, (False, True))
}


def section(report: dict[str, Any]) -> list[str]:
    environment, measured = report["environment"], report["rows"]
    lines = [
        "## Reading images",
        "",
        ". ".join(environment["setting"].values()) + ".",
        "",
        machine(environment),
        "",
    ]
    lines += [
        "| | images/s | seconds a batch | x | peak MiB of the main process | x |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in measured.items():
        if "error" in found:
            lines.append(f"| {ROWS[name].title} | did not run: {found['error']} | | | | |")
            continue
        alone = measured.get(f"{name.split('/')[0]}/0", {})
        speed, rest = f"{BATCH / found['seconds']:,.0f}", " | ".join(cells(found, alone))
        lines.append(f"| {ROWS[name].title} | {speed} | {rest} |")
    return lines


PART = Part(
    "decode",
    ROWS,
    default=[
        "shards/0",
        "shards/1",
        "shards/2",
        "shards/4",
        "shards_crops/0",
        "shards_crops/2",
        "folder/0",
    ],
    rounds=2,
    packages=("torch", "torchvision", "pillow", "kornia"),
    setting={
        "images": f"JPEGs of {PHOTO[0]}x{PHOTO[1]} read, decoded and fitted to "
        f"{SIZE[0]}x{SIZE[1]}, batch {BATCH}, in the page cache",
        "crops": "Crops by the recipe of DINO in the main process: 2 of 224 and 6 of 96 pixels, "
        "jitter, blur, solarisation",
        "ratios": "Ratios are to the same without workers",
    },
    section=section,
)

if __name__ == "__main__":
    PART.main(__doc__)
