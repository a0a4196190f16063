"""A sequence whose items are made on request, so that a process makes only those it needs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Source = TypeVar("Source")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Lazy(Generic[Source, Item]):
    """make(source) for each of `sources`."""

    make: Callable[[Source], Item]
    sources: Sequence[Source]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, k: int) -> Item:
        return self.make(self.sources[k])

    def __iter__(self) -> Iterator[Item]:
        return map(self.make, self.sources)


def runs(sources: Sequence[Source], size: int) -> list[Sequence[Source]]:
    """The sources in order, `size` at a time; the last may be fewer."""
    return [sources[first : first + size] for first in range(0, len(sources), size)]
