"""Text samples for the report: generated answers, and tokens with their designed targets."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """A question with its reference answer and a generated answer."""

    question: str
    expected: str
    given: str
    is_right: bool


class Candidate(NamedTuple):
    """A token and its probability under a designed target."""

    text: str
    share: float  # of the target


class Token(NamedTuple):
    """A token of a passage.

    Attributes:
        text: The decoded token.
        gate: The probability that its target gives to other tokens. None: the token is no target.
        candidates: The tokens with the largest probability.
        weight: Its weight in the loss, 1 on average. None: the weight is not designed.
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
        """Read what JSON made of `_asdict()`, with lists for tuples."""
        passages = [
            [
                Token(text, gate, [Candidate(*candidate) for candidate in candidates], *rest)
                for text, gate, candidates, *rest in passage
            ]
            for passage in state["passages"]
        ]
        return cls(passages, [Answer(*answer) for answer in state["answers"]])
