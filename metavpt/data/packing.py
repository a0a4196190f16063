"""Documents -> sequences of a fixed length."""

from collections.abc import Iterable, Iterator

from metavpt.data.tokens import Encoded
from metavpt.errors import MetaVPTError


class Packer:
    """Best-fit packing: rows of documents that together have at most `length` tokens; no document is divided, none is lost.

    A document goes into the fullest of the open rows that has room for it. Where none has, the
    fullest open row is given out; at the end all of them are. `num_rows` and `num_tokens` count
    what was given out: the rest of its `length` a row is padding.
    """

    def __init__(self, length: int, num_open: int = 16) -> None:
        if length < 1 or num_open < 1:
            raise MetaVPTError(f"packing: length={length} and num_open={num_open} must be positive")
        self.length, self.num_open = length, num_open
        self.num_rows = self.num_tokens = 0

    def __call__(self, documents: Iterable[Encoded]) -> Iterator[list[Encoded]]:
        rows: list[list[Encoded]] = []
        sizes: list[int] = []
        for document in documents:
            size = len(document.tokens)
            if size > self.length:
                raise MetaVPTError(
                    f"packing: a document of {size} tokens does not fit into {self.length}; "
                    "encode with that length"
                )
            best = max(
                (k for k, used in enumerate(sizes) if used + size <= self.length),
                key=sizes.__getitem__,
                default=None,
            )
            if best is not None:
                rows[best].append(document)
                sizes[best] += size
                continue
            if len(rows) == self.num_open:
                fullest = max(range(len(sizes)), key=sizes.__getitem__)
                yield self._count(rows.pop(fullest), sizes.pop(fullest))
            rows.append([document])
            sizes.append(size)
        yield from map(self._count, rows, sizes)

    def _count(self, row: list[Encoded], size: int) -> list[Encoded]:
        self.num_rows += 1
        self.num_tokens += size
        return row
