"""Removes documents that nearly equal a benchmark item: MinHash LSH, then n-gram Jaccard."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple, cast

from metavpt.data.text import Document
from metavpt.errors import MetaVPTError

WORD = re.compile(r"\w+")
# how probable it may be that a pair at the threshold is no candidate; false candidates only cost a
# comparison
MISSED = 0.005


class Match(NamedTuple):
    """A passage of a document and the item of a benchmark that it nearly equals."""

    where: str
    passage: str
    benchmark: str
    item: int
    text: str
    jaccard: float


class Benchmarks:
    """Items of benchmarks by name, in an index of their word n-grams.

    threshold   the Jaccard similarity |A & B| / |A | B| of two sets of n-grams from which they
    count as the same num_perm    hash functions of a MinHash

    Case and punctuation are ignored. Long texts are compared in windows of the items' median length
    that overlap by a half.
    """

    def __init__(
        self,
        texts: Mapping[str, Iterable[str]],
        ngram: int = 3,
        threshold: float = 0.5,
        num_perm: int = 128,
    ) -> None:
        try:
            import datasketch
        except ImportError:
            raise MetaVPTError(
                "decontamination needs the package datasketch: pip install 'metavpt[language]'"
            ) from None
        if ngram < 1 or not 0 < threshold <= 1 or num_perm < 16:
            raise MetaVPTError(
                f"decontaminate: ngram={ngram} must be positive, threshold={threshold} in (0, 1] "
                f"and num_perm={num_perm} >= 16"
            )
        self.ngram, self.threshold = ngram, threshold
        self.items = [
            (name, k, text) for name, items in texts.items() for k, text in enumerate(items)
        ]
        self.grams = [self._grams(_words(text)) for _, _, text in self.items]
        if not any(self.grams):
            raise MetaVPTError("decontaminate: the benchmarks hold no text; name files with items")
        self.window = max(ngram, int(median(len(_words(text)) for _, _, text in self.items)))
        self.blank = datasketch.MinHash(num_perm)
        self.lsh = datasketch.MinHashLSH(num_perm=num_perm, params=_bands(threshold, num_perm))
        with self.lsh.insertion_session() as session:
            for k, grams in enumerate(self.grams):
                if grams:
                    session.insert(k, self._minhash(grams))

    def match(self, document: Document) -> Match | None:
        """The most similar item of a benchmark, if any reaches the threshold.

        Compares the question; of plain text, all of it.
        """
        best: Match | None = None
        for passage in self._passages(document):
            grams = self._grams(passage)
            for k in sorted(self._candidates(grams)):
                jaccard = len(grams & self.grams[k]) / len(grams | self.grams[k])
                if jaccard >= self.threshold and (best is None or jaccard > best.jaccard):
                    name, item, text = self.items[k]
                    best = Match(document.where, " ".join(passage), name, item, text, jaccard)
        return best

    def _candidates(self, grams: frozenset[str]) -> list[int]:
        return cast(list[int], self.lsh.query(self._minhash(grams))) if grams else []

    def _passages(self, document: Document) -> Iterator[list[str]]:
        words = _words(document.question or document.answer)
        if document.question or len(words) <= 2 * self.window:
            yield words
        if not document.question and len(words) > self.window:
            for first in range(0, len(words) - self.window // 2, max(1, self.window // 2)):
                yield words[first : first + self.window]

    def _grams(self, words: list[str]) -> frozenset[str]:
        """The n-grams; all the words where there are fewer than n."""
        return frozenset(
            " ".join(words[k : k + self.ngram])
            for k in range(max(len(words) - self.ngram + 1, min(len(words), 1)))
        )

    def _minhash(self, grams: frozenset[str]):
        minhash = self.blank.copy()
        minhash.update_batch([gram.encode() for gram in grams])
        return minhash


class Decontaminated:
    """The documents that match no item of the benchmarks. `removed` holds the others.

    It can be read repeatedly.
    """

    def __init__(self, documents: Iterable[Document], benchmarks: Benchmarks) -> None:
        self.documents, self.benchmarks = documents, benchmarks
        self.removed: dict[str, Match] = {}
        self.num_read = 0

    def __iter__(self) -> Iterator[Document]:
        for number, document in enumerate(self.documents, 1):
            self.num_read = max(self.num_read, number)
            match = self.benchmarks.match(document)
            if match is None:
                yield document
            else:
                self.removed[document.where or f"document {number}"] = match

    def write_report(self, path: str | Path) -> None:
        """Write JSON lines: the counts, then every removed document with its match."""
        by_benchmark: dict[str, int] = {name: 0 for name, _, _ in self.benchmarks.items}
        for match in self.removed.values():
            by_benchmark[match.benchmark] += 1
        counts = {
            "read": self.num_read,
            "removed": len(self.removed),
            "by_benchmark": by_benchmark,
            "ngram": self.benchmarks.ngram,
            "threshold": self.benchmarks.threshold,
        }
        rows = [
            counts,
            *(
                match._asdict() | {"jaccard": round(match.jaccard, 4)}
                for match in self.removed.values()
            ),
        ]
        Path(path).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )


def _bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """Return the longest bands of which a pair at the threshold shares one almost surely.

    The probability 1 - (1 - threshold^r)^b must be at least 1 - MISSED.
    """
    sizes = (r for r in range(num_perm, 0, -1) if (1 - threshold**r) ** (num_perm // r) <= MISSED)
    size = next(sizes, 1)
    return num_perm // size, size


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())
