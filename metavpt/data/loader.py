"""Endless batches in an order that a seed sets, with a position that can be jumped to."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from metavpt.cli.console import say
from metavpt.data.frames import RGBDFrames
from metavpt.data.lazy import Lazy, runs
from metavpt.errors import MetaVPTError

WINDOW = 16  # files
MAX_UNREADABLE = 10  # in a row; more is no damaged file but a damaged set
NUM_PLACES = 512  # processes that count skips apart from each other


class Batch(NamedTuple):
    """Unlabelled images uint8 (B,3,H,W), and the seed of all randomness in what is made of them."""

    images: Tensor
    seed: int


class EndlessBatches(Sampler[list[int]]):
    """Endless batches of indices. Epoch e is the permutation seeded by (seed, e).

    Batches run on across epochs.

    Args:
        num_items: The number of items.
        batch_size: Items of a batch.
        seed: The seed.
        first: The first batch.
        part: (k, n): only the k-th n-th part of each batch.
        groups: How many consecutive items lie in each file. Items are then drawn from `WINDOW`
            files at a time, in a random order of the files, so that reading stays within few of
            them.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        seed: int,
        first: int = 0,
        part: tuple[int, int] = (0, 1),
        groups: Sequence[int] = (),
    ) -> None:
        self.num_items, self.batch_size, self.seed, self.first, self.part = (
            num_items,
            batch_size,
            seed,
            first,
            part,
        )
        self.groups = groups

    def __iter__(self) -> Iterator[list[int]]:
        epoch, at = divmod(self.first * self.batch_size, self.num_items)
        order = self._order(epoch)
        k, n = self.part
        own = slice(k * self.batch_size // n, (k + 1) * self.batch_size // n)
        while True:
            batch: list[int] = []
            while len(batch) < self.batch_size:
                if at == self.num_items:
                    epoch, at = epoch + 1, 0
                    order = self._order(epoch)
                taken = order[at : at + self.batch_size - len(batch)]
                batch, at = batch + taken, at + len(taken)
            yield batch[own]

    def _order(self, epoch: int) -> list[int]:
        rng = torch.Generator().manual_seed(mix(self.seed, epoch))
        if len(self.groups) <= WINDOW:
            return torch.randperm(self.num_items, generator=rng).tolist()
        files = torch.arange(self.num_items).split(list(self.groups))
        windows = torch.randperm(len(files), generator=rng).split(WINDOW)
        drawn = [torch.cat([files[k] for k in window.tolist()]) for window in windows]
        return torch.cat(
            [items[torch.randperm(len(items), generator=rng)] for items in drawn]
        ).tolist()


class ImageLoader:
    """Endless `Batch`es of images uint8 (3, H, W), on `device`."""

    def __init__(
        self,
        images: Dataset[Tensor],
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        count = len(images)  # type: ignore[arg-type]
        _check_size(count, batch_size, "problem.batch_size", "images")
        self.images, self.batch_size, self.seed, self.num_workers, self.device = (
            images,
            batch_size,
            seed,
            num_workers,
            device,
        )
        self.first, self.part = 0, (0, 1)

    def skip(self, num_batches: int) -> None:
        """Start at batch `num_batches`, without decoding those before it."""
        self.first = num_batches

    def share(self, rank: int, size: int) -> None:
        """Give and decode the rank's own rows of each batch alone."""
        _check_share(self.batch_size, size, "problem.batch_size or problem.meta_batch_size")
        self.part = (rank, size)

    def __iter__(self) -> Iterator[Batch]:
        groups = getattr(self.images, "groups", ())
        count = len(self.images)  # type: ignore[arg-type]
        sampler = EndlessBatches(count, self.batch_size, self.seed, self.first, self.part, groups)
        for k, images in enumerate(
            _load(self.images, sampler, self.num_workers, torch.stack), start=self.first
        ):
            yield Batch(images.to(self.device, non_blocking=True), mix(self.seed, k))


class FrameLoader:
    """Endless batches of the frames at `indices`, of their type; `skip` as in `ImageLoader`."""

    def __init__(
        self,
        frames: RGBDFrames,
        indices: Sequence[int],
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        _check_size(
            len(indices), batch_size, "problem.feedback_batch_size", "labelled frames of its pool"
        )
        self.frames, self.indices, self.batch_size, self.seed = frames, indices, batch_size, seed
        self.num_workers, self.device = num_workers, device
        self.first, self.part = 0, (0, 1)

    def skip(self, num_batches: int) -> None:
        """Start at batch `num_batches`, without decoding those before it."""
        self.first = num_batches

    def share(self, rank: int, size: int) -> None:
        """Give and decode only the rank's own rows of each batch."""
        _check_share(self.batch_size, size, "problem.feedback_batch_size")
        self.part = (rank, size)

    def __iter__(self) -> Iterator[Any]:
        sampler = EndlessBatches(
            len(self.indices), self.batch_size, self.seed, self.first, self.part
        )
        for batch in _load(
            _Picked(self.frames, self.indices), sampler, self.num_workers, collate_frames
        ):
            yield batch._make(field.to(self.device, non_blocking=True) for field in batch)

    @staticmethod
    def in_order(
        frames: RGBDFrames,
        indices: Sequence[int],
        batch_size: int,
        device: torch.device | str = "cpu",
    ) -> Lazy[Sequence[int], Any]:
        """One pass over `indices`; the last batch may be smaller."""

        def batch(which: Sequence[int]) -> Any:
            made = collate_frames([frames[i] for i in which])
            return made._make(field.to(device) for field in made)

        return Lazy(batch, runs(indices, batch_size))


class JointLoader:
    """Endless batches of several sets at once, {name: batch}; `skip` as in `ImageLoader`."""

    def __init__(self, loaders: Mapping[str, FrameLoader]) -> None:
        self.loaders = loaders

    def skip(self, num_batches: int) -> None:
        """Start at batch `num_batches`, without decoding those before it."""
        for loader in self.loaders.values():
            loader.skip(num_batches)

    def share(self, rank: int, size: int) -> None:
        """Give and decode only the rank's own rows of each batch."""
        for loader in self.loaders.values():
            loader.share(rank, size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batches in zip(*self.loaders.values(), strict=True):
            yield dict(zip(self.loaders, batches, strict=True))


class Skips:
    """How many reads were passed over, by this process and its loading workers together.

    Part of a checkpoint.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(NUM_PLACES, dtype=torch.int64, device="cpu").share_memory_()

    def add_one(self) -> None:
        """Count a skipped read."""
        worker = get_worker_info()
        self.counts[(worker.id + 1 if worker else 0) % NUM_PLACES] += 1

    @property
    def total(self) -> int:
        """Return the count of all processes."""
        return int(self.counts.sum())

    def state_dict(self) -> dict[str, int]:
        """Return the count."""
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the count."""
        self.counts.zero_()
        self.counts[0] = state["total"]


class Readable(Dataset[Tensor]):
    """`images`, with the next readable one in place of each unreadable one.

    The first failure of each image is named on stderr. The replacement does not depend on the run:
    the same seed gives the same batches, resumed or not.
    """

    def __init__(self, images: Dataset[Tensor], skips: Skips) -> None:
        self.images, self.skips = images, skips
        self._named: set[int] = set()

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        reason = ""
        for at in range(index, index + min(MAX_UNREADABLE, len(self))):
            try:
                return self.images[at % len(self)]
            except MetaVPTError as error:
                reason = str(error)
                self._skip(at % len(self), reason)
        raise MetaVPTError(f"{MAX_UNREADABLE} images in a row cannot be read, the last: {reason}")

    def _skip(self, index: int, reason: str) -> None:
        self.skips.add_one()
        if index not in self._named:
            self._named.add(index)
            say("data:", f"skipped: {reason}")


class _Picked(Dataset[Any]):
    def __init__(self, frames: RGBDFrames, indices: Sequence[int]) -> None:
        self.frames, self.indices = frames, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: int) -> Any:
        return self.frames[self.indices[k]]


def collate_frames(frames: Sequence[Any]) -> Any:
    """Stack frames field by field, to a batch of their type."""
    return frames[0]._make(torch.stack(fields) for fields in zip(*frames, strict=True))


def mix(seed: int, k: int) -> int:
    """A seed below 2^62 for the k-th thing under `seed`: neighbours share nothing (splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + k * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 2


class _Failure(NamedTuple):
    message: str


class _Batches(Dataset[Any]):
    """Loads a batch in one call, and returns data errors as values.

    A worker would send a page of traceback with an exception.
    """

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitems__(self, indices: list[int]) -> Any:
        try:
            return self.collate([self.dataset[k] for k in indices])
        except MetaVPTError as error:
            return _Failure(str(error))


def _load(
    dataset: Dataset[Any], sampler: EndlessBatches, num_workers: int, collate: Callable[[Any], Any]
) -> Iterator[Any]:
    loader = DataLoader(
        _Batches(dataset, collate),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(
            mix(sampler.seed, -1)
        ),  # seeds the workers; the global generator stays where it is
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_give_back,
    )
    for batch in loader:
        if isinstance(batch, _Failure):
            raise MetaVPTError(batch.message)
        yield batch


def _give_back(_: int) -> None:
    """Return freed pages to the system before workers are forked, which would hold copies."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


def _as_it_is(batch: Any) -> Any:
    return batch


def _check_size(num_items: int, batch_size: int, key: str, what: str) -> None:
    if not 1 <= batch_size <= num_items:
        raise MetaVPTError(
            f"{key}={batch_size} must be at least 1 and at most the {num_items} {what}"
        )


def _check_share(batch_size: int, num_processes: int, key: str) -> None:
    if batch_size % num_processes:
        raise MetaVPTError(
            f"{key}={batch_size}: {num_processes} processes cannot share it alike; choose a "
            f"multiple of {num_processes}"
        )
