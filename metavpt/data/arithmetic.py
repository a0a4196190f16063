"""Generated arithmetic problems with worked steps, by reasoning-gym: a small language data set."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from typing import Any

from metavpt.data.gsm8k import FINAL, WordProblem
from metavpt.data.loader import mix
from metavpt.data.text import Document
from metavpt.errors import MetaVPTError

PARTS = ("stream", "feedback", "test")
HELD_OUT = {0: "test", 1: "feedback"}  # the rest, 14 of 16, is the stream's
BLOCK = 4096  # reasoning-gym prepares a data set for its size, and seeds item i of it by seed + i
MAX_REPEATS = 100_000  # draws in a row without a new problem, before the kinds count as exhausted
REQUEST = " Give the result as your final answer. Do not include units."
CHAINS = {
    "min_terms": 2,
    "max_terms": 4,
    "min_digits": 1,
    "max_digits": 1,
}  # within reach of a small model in a minute


class Arithmetic:
    """Problems of the generators in `kinds` that belong to one `part`, in an order set by the seed.

    kinds   name of a reasoning-gym generator -> its options, and `weight`; those of `chain_sum` set
    its difficulty limit   so many different problems; None: without end, and some come again

    What a question hashes to says whether it is the stream's, feedback's or the test's, so no
    question is in two parts, whatever the seeds. `chain_sum` has its partial results for steps and
    `gsm_symbolic` its own solution; other generators have an answer alone.
    """

    def __init__(
        self,
        part: str,
        kinds: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        if part not in PARTS:
            raise MetaVPTError(f"arithmetic: part={part!r} must be one of {', '.join(PARTS)}")
        self.part, self.seed, self.limit = part, seed, limit
        self.kinds = {
            name: dict(options) for name, options in (kinds or {"chain_sum": CHAINS}).items()
        }
        self.weights = [float(options.pop("weight", 1.0)) for options in self.kinds.values()]
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise MetaVPTError(
                f"arithmetic: the weights {self.weights} of {', '.join(self.kinds)} must not be "
                "negative, nor all 0"
            )
        for name in self.kinds:
            self._block(name, seed=0)

    def __iter__(self) -> Iterator[Document]:
        return self.draw(self.seed)

    def draw(self, seed: int) -> Iterator[Document]:
        """Return the documents of all problems, in an order set by `seed`."""
        return (problem.document for problem in self.problems(seed))

    def problems(self, seed: int | None = None) -> Iterator[WordProblem]:
        """Return the problems with their final answers. Default seed: that of the constructor."""
        drawn = self._drawn(self.seed if seed is None else seed)
        return drawn if self.limit is None else islice(self._distinct(drawn), self.limit)

    def _drawn(self, seed: int) -> Iterator[WordProblem]:
        rng = random.Random(seed)
        generators = {name: self._items(name, mix(seed, k)) for k, name in enumerate(self.kinds)}
        while True:
            (name,) = rng.choices(list(generators), self.weights)
            yield next(generators[name])

    def _items(self, name: str, seed: int) -> Iterator[WordProblem]:
        worked = WORKED.get(name, _answer_only)
        repeats = 0
        for block in count():
            for index, item in enumerate(islice(self._block(name, mix(seed, block)), BLOCK)):
                problem = worked(item)
                if part_of(problem.question) == self.part:
                    repeats = 0
                    yield problem._replace(
                        where=f"{name} of seed {seed}, problem {block * BLOCK + index}"
                    )
                repeats += 1
            if repeats > MAX_REPEATS:
                raise MetaVPTError(
                    f"arithmetic.kinds.{name}: no problem falls into the part {self.part!r}; "
                    "raise its difficulty"
                )

    def _block(self, name: str, seed: int) -> Any:
        try:
            import reasoning_gym

            return reasoning_gym.create_dataset(name, seed=seed, size=BLOCK, **self.kinds[name])
        except ImportError:
            raise MetaVPTError(
                "generated problems need the package reasoning-gym: pip install 'metavpt[language]'"
            ) from None
        except (TypeError, ValueError, AssertionError) as error:
            raise MetaVPTError(
                f"arithmetic.kinds.{name}: {error}; see reasoning-gym's generators and their "
                "options"
            ) from None

    def _distinct(self, drawn: Iterator[WordProblem]) -> Iterator[WordProblem]:
        seen: set[str] = set()
        repeats = 0
        for problem in drawn:
            repeats += 1
            if problem.question not in seen:
                repeats = 0
                seen.add(problem.question)
                yield problem
            elif repeats == MAX_REPEATS:
                raise MetaVPTError(
                    f"arithmetic: the part {self.part!r} of {', '.join(self.kinds)} has but "
                    f"{len(seen)} different problems, "
                    f"not {self.limit}; lower the limit or raise the difficulty"
                )


def part_of(question: str) -> str:
    """The part of the data that a question belongs to, by a hash of its text."""
    return HELD_OUT.get(
        hashlib.blake2b(question.encode(), digest_size=1).digest()[0] % 16, "stream"
    )


def _chain(item: dict[str, Any]) -> WordProblem:
    """Make a chain of sums from the left: 12 + 5 - 4 gives "12 + 5 = 17" and "17 - 4 = 13"."""
    first, *rest = item["metadata"]["expression"].split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {result}")
        total = result
    if str(total) != item["answer"]:
        raise MetaVPTError(
            f"arithmetic.kinds.chain_sum: reasoning-gym says {item['answer']} for "
            f"{item['metadata']['expression']}"
        )
    return WordProblem(
        f"What is {item['metadata']['expression']}?", "\n".join(steps), item["answer"]
    )


def _gsm_symbolic(item: dict[str, Any]) -> WordProblem:
    steps = item["metadata"]["answer_cot"].rpartition(FINAL)[0].strip()
    return WordProblem(item["question"].removesuffix(REQUEST), steps, item["answer"])


def _answer_only(item: dict[str, Any]) -> WordProblem:
    return WordProblem(item["question"], "", str(item["answer"]))


WORKED: dict[str, Callable[[dict[str, Any]], WordProblem]] = {
    "chain_sum": _chain,
    "gsm_symbolic": _gsm_symbolic,
}
