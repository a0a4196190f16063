"""The texts of a run as its page shows them: answers at the first and at the last step, and the last targets that were chosen."""

import json
from pathlib import Path
from typing import NamedTuple

from metavpt.probes.samples import Answer, Texts, Token


class Answers(NamedTuple):
    """The answers to one question; `last` is None where there is only one step."""

    first: Answer
    last: Answer | None


class TextPage(NamedTuple):
    """`steps` are the first and the last with answers, `step` is that of `passages`, None where there are none."""

    answers: list[Answers]
    steps: tuple[int, int]
    passages: list[list[Token]]
    step: int | None

    @property
    def weighted(self) -> bool:
        """Whether tokens differ in how much they count, and not in their targets."""
        return any(token.weight is not None for passage in self.passages for token in passage)


def read_texts(folder: Path) -> TextPage:
    """texts/step<N>.json of a run; a file that a killed run left half written is passed over."""
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
    """A token by itself, with signs for its spaces and line breaks."""
    return text.replace(" ", "\N{MIDDLE DOT}").replace("\n", "\N{RETURN SYMBOL}")


def _read(path: Path) -> Texts | None:
    try:
        return Texts.parse(json.loads(path.read_text(encoding="utf-8")))
    except Exception:  # half written, or by someone else
        return None
