"""The data of a language problem: stream, feedback, test problems and general text.

`LanguageData` is text, `TokenData` the same in tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metavpt.cli.console import say
from metavpt.data.decontaminate import Benchmarks, Decontaminated
from metavpt.data.gsm8k import WordProblem
from metavpt.data.mixture import Component, Drawable, Generated, PackedLoader, ShuffleBuffer
from metavpt.data.text import Document
from metavpt.data.tokens import PADDING, Corpus, Encoder, ExampleLoader, TokenBatch, text_of
from metavpt.errors import MetaVPTError

SAMPLE = 2000  # documents of each source that a tokenizer is trained on

Item = Document | WordProblem


@dataclass(frozen=True)
class Source:
    """One source of the stream: documents, or a generator with its own `draw` (`Arithmetic`).

    Attributes:
        documents: The documents or the generator.
        weight: See `Component`.
        domain: See `Component`.
        max_epochs: See `Component`.
        buffer: None: held in memory. Otherwise read as a stream, each document drawn from the next
            `buffer`.
    """

    documents: Any
    weight: float = 1.0
    domain: str = "math"
    max_epochs: int | None = None
    buffer: int | None = None

    @property
    def is_generated(self) -> bool:
        """Return whether the source is a generator."""
        return hasattr(self.documents, "draw")


class LanguageData:
    """What a language problem trains on and is measured on, as text.

    stream       sources by name
    feedback     documents or word problems by domain: of each the first `num_feedback` are the pool
    and the next `num_held_out` belong to
                 no pool, to measure on them what the pool predicts
    test         word problems or documents by name, the first `num_test` of each
    general      documents by name, the first `num_general` of each: text that feedback is not about
    on_error     as in `Encoder`, for all but the test problems: what happens to a document whose
    prompt leaves no room for its answer benchmarks   texts by name -> `Benchmarks`: documents read
    into the stream that nearly equal a question of feedback or test are left
                 out. None: none are
    report       a folder for the list of these documents, a file for each source that is held in
    memory path         the folder that the files lie in; it must exist
    """

    def __init__(
        self,
        stream: Mapping[str, Source],
        feedback: Mapping[str, Iterable[Item]],
        test: Mapping[str, Iterable[Item]],
        general: Mapping[str, Iterable[Item]] | None = None,
        num_feedback: int = 1024,
        num_held_out: int = 256,
        num_test: int = 200,
        num_general: int = 100,
        benchmarks: Callable[[Mapping[str, Iterable[str]]], Benchmarks] | None = None,
        on_error: str = "raise",
        report: str | None = None,
        path: str | None = None,
    ) -> None:
        if path is not None and not Path(path).is_dir():
            raise MetaVPTError(
                f"data.path={path}: no such folder; name the one that holds gsm8k, mathtext and "
                "generaltext"
            )
        if not stream or not feedback or not test:
            raise MetaVPTError("data: stream, feedback and test must each name a source")
        twice = set(test) & set(general or {})
        if twice:
            raise MetaVPTError(
                f"data.general.{min(twice)}: data.test has this name, and metrics go by it; "
                "choose another"
            )
        is_generated = all(source.is_generated for source in stream.values())
        if is_generated:
            _say(
                "generated arithmetic; for GSM8K and real text give data=gsm8k "
                "data.path=/path/to/folder",
                left_out=False,
            )
        self.stream, self.on_error, self.report = stream, on_error, report
        self.feedback, self.held_out = {}, {}
        for domain, source in feedback.items():
            taken = _first(
                source,
                num_feedback + num_held_out,
                f"data.feedback.{domain}",
                "num_feedback + data.num_held_out",
            )
            self.feedback[domain], self.held_out[domain] = (
                taken[:num_feedback],
                taken[num_feedback:],
            )
        self.test = {
            name: _first(source, num_test, f"data.test.{name}", "num_test")
            for name, source in test.items()
        }
        self.general = {
            name: _first(source, num_general, f"data.general.{name}", "num_general")
            for name, source in (general or {}).items()
        }
        self.benchmarks = (
            benchmarks(dict(self._questions())) if benchmarks and not is_generated else None
        )

    def texts(self) -> Iterator[str]:
        """The beginning of every source of the stream, to train a tokenizer on."""
        for source in self.stream.values():
            yield from map(text_of, islice(source.documents, SAMPLE))

    def encode(self, tokenizer: Any, length: int) -> "TokenData":
        """The same in tokens, at most `length` of them in a row.

        Longer examples of feedback and test are cut, other documents split.
        """
        split, cut = (Encoder(tokenizer, length, long, self.on_error) for long in ("split", "cut"))
        whole = Encoder(
            tokenizer, length, "cut"
        )  # scores on fewer test problems than asked for would pass for scores on all
        components = [
            Component(
                self._drawable(name, source, split), source.weight, source.domain, source.max_epochs
            )
            for name, source in self.stream.items()
        ]
        parts = (
            (self.feedback, cut),
            (self.held_out, cut),
            (self.test, whole),
            (self.general, split),
        )
        corpora = [
            {name: Corpus(encoder(map(document_of, items)), name) for name, items in part.items()}
            for part, encoder in parts
        ]
        if cut.skipped:
            _say(
                f"feedback: {len(cut.skipped)} examples have a prompt that fills the {length} "
                "tokens of a row"
            )
        return TokenData(split, components, *corpora, problems=self.test)

    def _drawable(self, name: str, source: Source, encoder: Encoder) -> Drawable:
        if source.is_generated:
            return Generated(source.documents, encoder)
        documents = (
            source.documents
            if self.benchmarks is None
            else Decontaminated(source.documents, self.benchmarks)
        )
        if source.buffer:
            return ShuffleBuffer(documents, encoder, source.buffer)
        num_skipped = len(encoder.skipped)
        corpus = Corpus(encoder(documents), f"data.stream.{name}")
        if len(encoder.skipped) > num_skipped:
            _say(
                f"{name}: {len(encoder.skipped) - num_skipped} documents have a prompt that fills "
                f"the {encoder.length} tokens of a row"
            )
        if isinstance(documents, Decontaminated):
            self._report(name, documents)
        return corpus

    def _report(self, name: str, documents: Decontaminated) -> None:
        if documents.removed:
            _say(
                f"{name}: {len(documents.removed)} of {documents.num_read} documents nearly equal "
                "a question of feedback or test"
            )
        if self.report:
            Path(self.report).mkdir(parents=True, exist_ok=True)
            documents.write_report(Path(self.report) / f"{name}.jsonl")

    def _questions(self) -> Iterator[tuple[str, list[str]]]:
        for domain in self.feedback:
            documents = map(document_of, self.feedback[domain] + self.held_out[domain])
            yield (
                f"feedback {domain}",
                [document.question or document.answer for document in documents],
            )
        for name, problems in self.test.items():
            yield f"test {name}", [document_of(item).question for item in problems]


@dataclass(frozen=True)
class TokenData:
    """`LanguageData` in tokens, and the batches of it.

    `problems` are the items of `test`; word problems have their final answers.
    """

    encoder: Encoder
    components: list[Component]
    feedback: dict[str, Corpus]
    held_out: dict[str, Corpus]
    test: dict[str, Corpus]
    general: dict[str, Corpus]
    problems: dict[str, list[Item]] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        """What `TokenBatch.domain` counts."""
        return sorted({component.domain for component in self.components})

    def packed(self, batch_size: int, seed: int, device: torch.device) -> PackedLoader:
        """The stream, every source by its weight."""
        return self._loader(self.components, batch_size, seed, device)

    def packed_by_domain(
        self, batch_size: int, seed: int, device: torch.device
    ) -> "PackedLoader | ByDomain":
        """The stream; where several domains have feedback, with as many rows of each of them."""
        if len(self.feedback) == 1:
            return self.packed(batch_size, seed, device)
        groups = {name: [c for c in self.components if c.domain == name] for name in self.feedback}
        missing = [name for name, components in groups.items() if not components]
        if missing or batch_size < len(groups):
            what = (
                f"the stream has no domain {missing[0]!r}"
                if missing
                else f"meta_batch_size={batch_size} has no row for each"
            )
            raise MetaVPTError(f"data.feedback has the domains {', '.join(groups)}: {what}")
        size = batch_size // len(groups)
        return ByDomain(
            {
                self.domains.index(name): self._loader(group, size, seed, device)
                for name, group in groups.items()
            }
        )

    def examples(
        self, pools: Mapping[str, Corpus], batch_size: int | None, seed: int, device: torch.device
    ) -> "Examples":
        """Return batches of examples by domain. With `batch_size` None each is the whole pool."""
        return Examples(
            {
                name: ExampleLoader(pool, batch_size, seed, self.encoder.pad, device=device)
                for name, pool in pools.items()
            }
        )

    def _loader(
        self, components: list[Component], batch_size: int, seed: int, device: torch.device
    ) -> PackedLoader:
        return PackedLoader(
            components, self.encoder.length, batch_size, seed, self.encoder.pad, device
        )


@dataclass(frozen=True)
class Examples:
    """Endless batches of examples by domain; `skip(n)` as in `ExampleLoader`."""

    loaders: Mapping[str, ExampleLoader]

    def skip(self, num_batches: int) -> None:
        """Start at batch `num_batches`."""
        for loader in self.loaders.values():
            loader.skip(num_batches)

    def __iter__(self) -> Iterator[dict[str, TokenBatch]]:
        for batches in zip(*self.loaders.values(), strict=True):
            yield dict(zip(self.loaders, batches, strict=True))


@dataclass(frozen=True)
class ByDomain:
    """Batches with rows of every domain, in the order of `loaders`, by the number of the domain."""

    loaders: Mapping[int, PackedLoader]

    def skip(self, num_batches: int) -> None:
        """Start at batch `num_batches`."""
        for loader in self.loaders.values():
            loader.skip(num_batches)

    def __iter__(self) -> Iterator[TokenBatch]:
        for batches in zip(*self.loaders.values(), strict=False):
            numbered = (
                batch._replace(domain=torch.full_like(batch.domain, k))
                for k, batch in zip(self.loaders, batches, strict=True)
            )
            yield join(list(numbered))


def rows_of(batch: TokenBatch, which: Tensor) -> TokenBatch:
    """The rows that `which` names, by number or by True."""
    tokens, positions, documents, loss_mask, seed, domain = batch
    return TokenBatch(
        tokens[which], positions[which], documents[which], loss_mask[which], seed, domain[which]
    )


def by_length(batch: TokenBatch, size: int) -> list[TokenBatch]:
    """Cut a batch of one document per row into microbatches of `size` rows of similar length.

    Each is as long as its longest row. Both halves of the list hold short rows and long ones.
    """
    lengths = (batch.documents != PADDING).sum(dim=1)
    parts = []
    for rows in lengths.argsort(stable=True).split(size):
        tokens, positions, documents, loss_mask, seed, domain = rows_of(batch, rows)
        end = int(lengths[rows].max())
        tokens, positions, documents, loss_mask = (
            part[:, :end] for part in (tokens, positions, documents, loss_mask)
        )
        parts.append(TokenBatch(tokens, positions, documents, loss_mask, seed, domain))
    return parts[0::2] + parts[1::2]


def join(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The rows of all of them, which have one length, with the seed of the first."""
    tokens, positions, documents, loss_mask, seeds, domain = zip(*batches, strict=True)
    parts = [torch.cat(part) for part in (tokens, positions, documents, loss_mask)]
    return TokenBatch(*parts, seed=seeds[0], domain=torch.cat(domain))


def document_of(item: Item) -> Document:
    """The document of an item of a stream."""
    return item if isinstance(item, Document) else item.document


def _first(source: Any, count: int, name: str, option: str) -> list[Any]:
    """Return the first `count` items. Those of a generator are its problems."""
    items = list(islice(source.problems() if hasattr(source, "problems") else source, count))
    if len(items) < count:
        raise MetaVPTError(
            f"{name}: has {len(items)} documents, fewer than data.{option} = {count}"
        )
    return items


def _say(message: str, left_out: bool = True) -> None:
    say("data:", f"{message}{'; they are left out' if left_out else ''}")
