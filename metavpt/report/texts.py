"""Texts of a run for its page: answers at the first and last step, and the last targets."""

import json
from pathlib import Path
from typing import NamedTuple

from metavpt.probes.samples import Answer, Texts, Token


class Answers(NamedTuple):
    """The answers to one question. `last` is None if there is only one step."""

    first: Answer
    last: Answer | None


class TextPage(NamedTuple):
    """Answers and passages of a run.

    Attributes:
        answers: The answers by question.
        steps: The first and the last step with answers.
        passages: Tokens with their targets.
        step: The step of `passages`. None: there are none.
    """

    answers: list[Answers]
    steps: tuple[int, int]
    passages: list[list[Token]]
    step: int | None

    @property
    def weighted(self) -> bool:
        """Return whether weights of tokens are designed rather than their targets."""
        return any(token.weight is not None for passage in self.passages for token in passage)


def read_texts(folder: Path) -> TextPage:
    """Read texts/step<N>.json. A file that a killed run left half written is skipped."""
    found = {
        int(path.stem.removeprefix("step")): texts
        for path in sorted(folder.glob("step*.json"))
        if (texts := _read(path))
    }
    answered = [step for step, texts in found.items() if texts.answers] or [0]
    passages = [step for step, texts in found.items() if texts.passages]
    first, last = answered[0], answered[-1]
    later = {answer.question: answer for answer in found[last].answers} if last > first else {}
    answers = (
        [Answers(answer, later.get(answer.question)) for answer in found[first].answers]
        if first in found
        else []
    )
    return TextPage(
        answers,
        (first, last),
        found[passages[-1]].passages if passages else [],
        passages[-1] if passages else None,
    )


def visible(text: str) -> str:
    """Replace spaces and line breaks of a token by visible signs."""
    return text.replace(" ", "\N{MIDDLE DOT}").replace("\n", "\N{RETURN SYMBOL}")


def _read(path: Path) -> Texts | None:
    try:
        return Texts.parse(json.loads(path.read_text(encoding="utf-8")))
    except Exception:  # half written, or by someone else
        return None
