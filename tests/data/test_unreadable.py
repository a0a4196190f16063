"""Files that cannot be read and workers that die: one clear line, or a counted skip."""

import os
import signal
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.cli.one_line_errors import dead_worker
from metavpt.data.loader import ImageLoader
from metavpt.data.unreadable import Readable, Skips
from metavpt.errors import MetaVPTError


class Photos(Dataset[Tensor]):
    """Image k is filled with k; those in `broken` cannot be read."""

    def __init__(self, broken: set[int], num_items: int = 12) -> None:
        self.broken, self.num_items = broken, num_items

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> Tensor:
        if index in self.broken:
            raise MetaVPTError(f"photo{index}.jpg: not a readable image; remove or replace it")
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


class Deadly(Photos):
    def __getitem__(self, index: int) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_is_one_line_also_from_a_worker(num_workers: int):
    loader = ImageLoader(Photos({3}), 12, seed=0, num_workers=num_workers)
    with pytest.raises(MetaVPTError) as error:
        next(iter(loader))
    assert str(error.value) == "photo3.jpg: not a readable image; remove or replace it"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_puts_the_next_image_in_its_place_and_counts(
    num_workers: int, capfd: pytest.CaptureFixture[str]
):
    skips = Skips()
    whole = list(islice(ImageLoader(Photos(set()), 6, seed=1), 4))
    batches = list(
        islice(ImageLoader(Readable(Photos({3, 4}), skips), 6, seed=1, num_workers=num_workers), 4)
    )
    for batch, plain in zip(batches, whole, strict=True):
        expected = torch.where((plain.images == 3) | (plain.images == 4), 5, plain.images)
        assert torch.equal(batch.images, expected)
        assert batch.seed == plain.seed
    if num_workers == 0:
        assert skips.total == 2 * (2 + 1)  # two epochs: 3 is replaced by 4 and then by 5
        assert capfd.readouterr().err.count("skipped: photo3.jpg") == 1
    else:
        assert skips.total >= 6  # workers read ahead


def test_a_set_of_damaged_images_is_an_error():
    with pytest.raises(
        MetaVPTError, match=r"10 images in a row cannot be read, the last: photo11\.jpg"
    ):
        Readable(Photos(set(range(12))), Skips())[2]


def test_the_count_is_part_of_a_checkpoint():
    skips, other = Skips(), Skips()
    skips.add_one()
    other.load_state_dict(skips.state_dict())
    other.add_one()
    assert other.total == 2


def test_a_worker_that_dies_is_named():
    with pytest.raises(RuntimeError) as error:
        next(iter(ImageLoader(Deadly(set()), 2, seed=0, num_workers=1)))
    line = dead_worker(str(error.value))
    assert line is not None
    assert line.startswith("DataLoader worker (pid")
    assert (
        "killed by signal: Killed" in line or "exited unexpectedly" in line
    )  # whichever torch notices first
    assert "problem.num_workers=0" in line
    assert dead_worker("mat1 and mat2 shapes cannot be multiplied") is None
