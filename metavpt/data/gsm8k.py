"""Word problems with a number for answer: GSM8K, and the layouts of SVAMP and MAWPS."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from metavpt.data.text import BadRowError, Document, HubDataset, JsonLines, Rows, text_field

FINAL = "####"
ANNOTATION = re.compile(r"<<[^<>]*>>")
NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)")


class WordProblem(NamedTuple):
    """A question, the worked steps (may be empty) and the final number, without thousands signs."""

    question: str
    solution: str
    answer: str
    where: str = ""

    @property
    def document(self) -> Document:
        """Return the steps and then `#### answer` on its own line."""
        return Document(
            self.question, f"{self.solution}\n{FINAL} {self.answer}".lstrip(), self.where
        )


def word_problem(row: Mapping[str, Any], where: str, annotations: bool = False) -> WordProblem:
    """Read a row of GSM8K, SVAMP or MAWPS, recognised by its fields.

    GSM8K has {question, answer}, SVAMP {Body, Question, Answer} and MAWPS {problem, answer}.

    Args:
        row: The row.
        where: Its place, for errors.
        annotations: Whether to keep GSM8K's calculator marks <<48/2=24>>.
    """
    if "Body" in row:
        body = text_field(row, "Body")
        stop = "" if body.endswith((".", "?", "!", ",")) else "."
        return WordProblem(
            f"{body}{stop} {text_field(row, 'Question')}", "", _number(row, "Answer"), where
        )
    if "problem" in row:
        return WordProblem(text_field(row, "problem"), "", _number(row, "answer"), where)
    question, answer = text_field(row, "question"), text_field(row, "answer")
    solution, mark, final = answer.rpartition(FINAL)
    if not mark:
        raise BadRowError(f"field 'answer' has no final answer after {FINAL}")
    if not annotations:
        solution = ANNOTATION.sub("", solution)
    return WordProblem(question, solution.strip(), _number({"answer": final}, "answer"), where)


def read_word_problems(
    name: str | Path, annotations: bool = False, **options: Any
) -> Rows[WordProblem]:
    """Open problems in a .jsonl or .json file, or in a Hugging Face data set.

    Options are those of `JsonLines` and `HubDataset`.
    """
    convert: Callable[[Mapping[str, Any], str], WordProblem] = partial(
        word_problem, annotations=annotations
    )
    if Path(name).suffix in (".jsonl", ".json"):
        return JsonLines(name, convert, **options)
    return HubDataset(str(name), convert, **options)


def _number(row: Mapping[str, Any], name: str) -> str:
    """1600 for 1600.0, "1,600" and "$1600"."""
    if name not in row:
        raise BadRowError(f"no field {name!r} (it has {', '.join(map(repr, row))})")
    text = str(row[name]).strip().lstrip("$").replace(",", "").removesuffix(".")
    if not NUMBER.fullmatch(text):
        raise BadRowError(f"the final answer {row[name]!r} in field {name!r} is no number")
    return re.sub(r"(?<=\d)\.0*$", "", text)
