"""Images that cannot be read: passed over, named and counted, where a run is to survive them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from metavpt.cli.console import say
from metavpt.errors import MetaVPTError

MAX_IN_A_ROW = 10  # more is no damaged file but a damaged set
NUM_PLACES = 512  # processes that count apart from each other


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
        for at in range(index, index + min(MAX_IN_A_ROW, len(self))):
            try:
                return self.images[at % len(self)]
            except MetaVPTError as error:
                reason = str(error)
                self._skip(at % len(self), reason)
        raise MetaVPTError(f"{MAX_IN_A_ROW} images in a row cannot be read, the last: {reason}")

    def _skip(self, index: int, reason: str) -> None:
        self.skips.add_one()
        if index not in self._named:
            self._named.add(index)
            say("data:", f"skipped: {reason}")
