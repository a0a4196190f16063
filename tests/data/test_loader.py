import ctypes
import os
import signal
import sys
from itertools import islice

import pytest
import torch
from helpers.damaged import MIB, status
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.cli.one_line_errors import dead_worker
from metavpt.data.frames import RGBDFrames
from metavpt.data.loader import EndlessBatches, FrameLoader, ImageLoader, Readable, Skips, mix
from metavpt.data.nyuv2 import open_nyuv2
from metavpt.errors import MetaVPTError


class Numbers(Dataset[Tensor]):
    """Image k is filled with k; counts what is decoded."""

    def __init__(self, num_items: int) -> None:
        self.num_items, self.num_decoded = num_items, 0

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, index: int) -> Tensor:
        self.num_decoded += 1
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


class Memory(Numbers):
    """Every item is the anonymous memory of the process that reads it, in MiB."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(status("RssAnon") / MIB)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> RGBDFrames:
    return open_nyuv2(
        None, rooms={"folder": tmp_path_factory.mktemp("rooms"), "num_frames": 12, "size": (12, 16)}
    )


@pytest.mark.parametrize(("num_items", "batch_size"), [(12, 4), (13, 4), (5, 5), (7, 3)])
def test_each_epoch_has_every_item_once(num_items: int, batch_size: int):
    batches = list(islice(EndlessBatches(num_items, batch_size, seed=3), 4 * num_items))
    assert all(len(batch) == batch_size for batch in batches)
    order = [i for batch in batches for i in batch]
    epochs = [order[e * num_items : (e + 1) * num_items] for e in range(4)]
    assert all(sorted(epoch) == list(range(num_items)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_order_depends_on_the_seed_alone():
    first, again, other = (list(islice(EndlessBatches(20, 4, seed), 9)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("first", "num_workers"), [(0, 0), (1, 0), (3, 0), (4, 0), (17, 0), (3, 2)]
)
def test_skip_is_the_uninterrupted_order(first: int, num_workers: int):
    whole = list(islice(ImageLoader(Numbers(13), 4, seed=5), first + 3))
    resumed = ImageLoader(Numbers(13), 4, seed=5, num_workers=num_workers)
    resumed.skip(first)
    for expected, batch in zip(whole[first:], islice(resumed, 3), strict=True):
        assert torch.equal(batch.images, expected.images)
        assert batch.seed == expected.seed


def test_skip_decodes_nothing():
    images = Numbers(100)
    loader = ImageLoader(images, 10, seed=0)
    loader.skip(1_000_000)
    next(iter(loader))
    assert images.num_decoded == 10


def test_batch_seeds_are_distinct_and_the_global_generator_stays():
    state = torch.get_rng_state()
    seeds = [batch.seed for batch in islice(ImageLoader(Numbers(8), 8, seed=0), 50)]
    assert torch.equal(state, torch.get_rng_state())
    assert len(set(seeds)) == 50
    assert len({mix(seed, k) for seed in range(100) for k in range(100)}) == 10_000
    assert all(0 <= mix(seed, k) < 2**62 for seed in (0, -1, 2**63) for k in (0, -1, 2**40))


def test_frame_batches(frames: RGBDFrames):
    loader = FrameLoader(frames, frames.splits["val"], 2, seed=0)
    batch = next(iter(loader))
    assert (batch.image.shape, batch.depth.shape, batch.label.shape) == (
        (2, 3, 12, 16),
        (2, 12, 16),
        (2, 12, 16),
    )
    assert (batch.image.dtype, batch.depth.dtype, batch.label.dtype) == (
        torch.uint8,
        torch.float32,
        torch.int64,
    )
    known = {frames[i].image.numpy().tobytes() for i in frames.splits["val"]}
    for batch in islice(loader, 4):
        assert {image.numpy().tobytes() for image in batch.image} <= known
    loader.skip(3)
    assert torch.equal(next(iter(loader)).depth, batch.depth)


def test_frames_in_order(frames: RGBDFrames):
    batches = list(FrameLoader.in_order(frames, [3, 1, 2], 2))
    assert [len(batch.image) for batch in batches] == [2, 1]
    assert torch.equal(batches[1].depth[0], frames[2].depth)


def test_too_few_items_are_named(frames: RGBDFrames):
    with pytest.raises(MetaVPTError, match=r"batch_size=4 .* the 3 images"):
        ImageLoader(Numbers(3), 4, seed=0)
    with pytest.raises(MetaVPTError, match=r"batch_size=0"):
        ImageLoader(Numbers(3), 0, seed=0)
    with pytest.raises(
        MetaVPTError, match=r"problem\.feedback_batch_size=9 .* the 2 labelled frames"
    ):
        FrameLoader(frames, [0, 1], 9, seed=0)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="glibc's malloc_trim",
)
def test_loading_processes_do_not_hold_what_the_main_one_has_freed():
    parts = [
        torch.ones(64 * 1024, dtype=torch.uint8) for _ in range(2048)
    ]  # 128 MiB, too small each to be mapped by itself
    top = parts.pop()  # what lies below it is not returned when it is freed
    del parts
    freed = status("RssAnon") / MIB
    batch = next(iter(ImageLoader(Memory(4), 2, seed=0, num_workers=1)))
    assert freed - float(batch.images[0]) > 64, "MiB"
    assert status("RssAnon") / MIB > freed - 16, "the main process keeps what it will use again"
    assert top.all()


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
