"""What a report shows of text: answers beside those expected, and tokens with the targets that were chosen for them."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """A question with the expected answer and the one that was generated."""

    question: str
    expected: str
    given: str
    is_right: bool


class Candidate(NamedTuple):
    """A token that a target gives some of its probability to."""

    text: str
    share: float  # of the target


class Token(NamedTuple):
    """`gate` is the share of its target that other tokens have, None where it is no target; `candidates` hold the largest shares.

    `weight` is how much it counts in the loss, 1 on average, where that was chosen.
    """

    text: str
    gate: float | None = None
    candidates: list[Candidate] = []  # noqa: RUF012 - never written to
    weight: float | None = None


class Texts(NamedTuple):
    """Passages of tokens, and answers."""

    passages: list[list[Token]]
    answers: list[Answer]

    @classmethod
    def parse(cls, state: Mapping[str, Any]) -> "Texts":
        """From what JSON made of `_asdict()`: lists for tuples."""
        passages = [
            [
                Token(text, gate, [Candidate(*candidate) for candidate in candidates], *rest)
                for text, gate, candidates, *rest in passage
            ]
            for passage in state["passages"]
        ]
        return cls(passages, [Answer(*answer) for answer in state["answers"]])
