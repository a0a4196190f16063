"""Weighted mixtures of sources, packed, in a seeded order with random access to positions."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Protocol

import torch

from metavpt.data.loader import mix
from metavpt.data.text import Document
from metavpt.data.tokens import Encoded, Encoder, TokenBatch, collate
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


class Drawable(Protocol):
    """A source of one pass in a seeded order: `Corpus`, `ShuffleBuffer` or `Generated`."""

    def draw(self, seed: int) -> Iterator[Encoded]:
        """Return the documents in an order set by `seed`."""
        ...


class ShuffleBuffer:
    """Documents of a stream, tokenised as they are read, for sources too large for memory.

    Each is drawn from the next `size` documents.
    """

    def __init__(self, documents: Iterable[Document], encoder: Encoder, size: int = 10_000) -> None:
        if size < 1:
            raise MetaVPTError(f"shuffle buffer: size={size} must be 1 or more")
        self.documents, self.encoder, self.size = documents, encoder, size

    def draw(self, seed: int) -> Iterator[Encoded]:
        """Return the documents in an order set by `seed`."""
        rng = random.Random(seed)
        held: list[Encoded] = []
        for document in self.encoder(self.documents):
            if len(held) < self.size:
                held.append(document)
                continue
            k = rng.randrange(self.size)
            yield held[k]
            held[k] = document
        rng.shuffle(held)
        yield from held


class Generator(Protocol):
    """A source that makes documents afresh for every seed."""

    def draw(self, seed: int) -> Iterator[Document]:
        """Return new documents for `seed`."""
        ...


class Generated:
    """Documents made afresh for every seed, tokenised as they are made."""

    def __init__(self, generator: Generator, encoder: Encoder) -> None:
        self.generator, self.encoder = generator, encoder

    def draw(self, seed: int) -> Iterator[Encoded]:
        """Return new documents for `seed`."""
        return self.encoder(self.generator.draw(seed))


@dataclass(frozen=True)
class Component:
    """A source in a mixture.

    weight       its expected share of the rows, so of the tokens, up to the weights' sum
    domain       rows keep it, for feedback of the same domain
    max_epochs   the cap: after so many passes the source is used up and the others share its
    weight; None: no cap
    """

    documents: Drawable
    weight: float = 1.0
    domain: str = ""
    max_epochs: int | None = None


class PackedLoader:
    """`TokenBatch`es of a mixture. Every row holds documents of one source.

    It ends when all sources are used up, perhaps with a smaller batch. `domains` holds the names of
    the numbers in `TokenBatch.domain`.
    """

    def __init__(
        self,
        components: Sequence[Component],
        length: int,
        batch_size: int,
        seed: int,
        pad: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if not components or batch_size < 1:
            raise MetaVPTError(
                f"a mixture needs a source (it has {len(components)}) and "
                f"problem.batch_size={batch_size} 1 or more"
            )
        for component in components:
            if not 0 < component.weight < float("inf") or (
                component.max_epochs is not None and component.max_epochs < 1
            ):
                raise MetaVPTError(
                    f"mixture, domain {component.domain!r}: weight={component.weight} must be "
                    "positive and "
                    f"max_epochs={component.max_epochs} 1 or more"
                )
        self.components, self.length, self.batch_size, self.seed, self.pad, self.device = (
            components,
            length,
            batch_size,
            seed,
            pad,
            device,
        )
        self.domains = sorted({component.domain for component in components})
        self.packers: list[Packer] = []
        self.first = 0

    def skip(self, num_batches: int) -> None:
        """Start at batch `num_batches`.

        Earlier batches are packed without tensors, and documents in a `Corpus` are not read.
        """
        self.first = num_batches

    @property
    def padding(self) -> float:
        """The share of padding in the rows since the last `iter`."""
        num_tokens, num_rows = (
            sum(getattr(packer, name) for packer in self.packers)
            for name in ("num_tokens", "num_rows")
        )
        return 1 - num_tokens / (self.length * num_rows) if num_rows else 0.0

    def __iter__(self) -> Iterator[TokenBatch]:
        domain = [self.domains.index(component.domain) for component in self.components]
        for n, batch in enumerate(islice(self._batches(), self.first, None), start=self.first):
            rows, domains = [row for _, row in batch], [domain[k] for k, _ in batch]
            yield collate(rows, self.length, self.pad, mix(self.seed, n), domains).to(self.device)

    def _batches(self) -> Iterator[list[tuple[int, list[Encoded]]]]:
        """The rows of each batch, with the source of each."""
        self.packers = [Packer(self.length) for _ in self.components]
        rows = {k: packer(self._documents(k)) for k, packer in enumerate(self.packers)}
        for n in count():
            rng = random.Random(mix(self.seed, n))
            batch: list[tuple[int, list[Encoded]]] = []
            while rows and len(batch) < self.batch_size:
                (k,) = rng.choices(list(rows), [self.components[k].weight for k in rows])
                row = next(rows[k], None)
                if row is None:
                    del rows[k]
                else:
                    batch.append((k, row))
            if not batch:
                return
            yield batch

    def _documents(self, k: int) -> Iterator[Encoded]:
        component = self.components[k]
        for epoch in count() if component.max_epochs is None else range(component.max_epochs):
            num_documents = 0
            for document in component.documents.draw(mix(mix(self.seed, -1 - k), epoch)):
                num_documents += 1
                yield document
            if num_documents == 0:
                raise MetaVPTError(
                    f"mixture, domain {component.domain!r}: the source is empty, it gave no "
                    "document at all"
                )
