"""Documents -> sequences of a fixed length."""

from collections.abc import Iterable, Iterator

from metavpt.data.tokens import Encoded
from metavpt.errors import MetaVPTError


class Packer:
    """Best-fit packing of whole documents into rows of at most `length` tokens.

    A document goes into the fullest open row with room for it. If there is none, the fullest open
    row is emitted; at the end all are. `num_rows` and `num_tokens` count what was emitted, so the
    rest of `length` in a row is padding.
    """

    def __init__(self, length: int, num_open: int = 16) -> None:
        if length < 1 or num_open < 1:
            raise MetaVPTError(f"packing: length={length} and num_open={num_open} must be positive")
        self.length, self.num_open = length, num_open
        self.num_rows = self.num_tokens = 0

    def __call__(self, documents: Iterable[Encoded]) -> Iterator[list[Encoded]]:
        """Iterate over the rows."""
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
