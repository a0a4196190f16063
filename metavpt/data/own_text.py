"""A user's own text and answers: files of text for the stream, rows with free-text answers."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metavpt.cli.console import say
from metavpt.data.language import LanguageData, Source
from metavpt.data.text import PLAIN, Document, Format, JsonLines, PlainText, document_format
from metavpt.errors import MetaVPTError

SUFFIXES = (".txt", ".md", ".jsonl", ".json")
NAME = "answers"  # of the domain, and of the metric answers/nll
Places = str | Sequence[str]


def text_data(
    path: str,
    stream: Places = "stream",
    answers: Places = "answers.jsonl",
    test: Places | float | None = None,
    general: Places | None = None,
    format: Mapping[str, Any] | None = None,
    unit: str = "paragraph",
    num_feedback: int | None = None,
    num_held_out: int | None = None,
    on_error: str = "raise",
    benchmarks: Any = None,
    seed: int = 0,
) -> LanguageData:
    """Open text to train on, and prompts with answers that are scored by their likelihood.

    Args:
        path: The folder that all places are relative to.
        stream: Text to train on: a file, a folder (searched at any depth), a pattern, or several.
            .txt and .md are text; rows of .jsonl and .json have a field `text`, or those of
            `format`.
        answers: Files of rows with a prompt and an answer.
        test: The same, to be scored; or their share, drawn by `seed`. None: a fifth.
        general: Text or answers whose perplexity is measured as a side effect.
        format: The fields, {question: [prompt], answer: answer} if None.
        unit: What a document of a text file is: a paragraph, a line or the file.
        num_feedback: Examples for feedback. None: four fifths of those that are not tested.
        num_held_out: Examples that no update reads, to measure what the feedback predicts. None:
            the rest.
        on_error: "skip" leaves out rows that cannot be read or that fill the context.
        benchmarks: See `LanguageData`.
        seed: Of the draws.

    Raises:
        MetaVPTError: A file that is missing, cannot be read or is too short. The message names it.
    """
    root = Path(path)
    if not root.is_dir():
        raise MetaVPTError(f"data.path={path}: no such folder; name that of your texts")
    fields = document_format("data", format or {"question": ["prompt"], "answer": "answer"})
    read = partial(_documents, root, fields=fields, unit=unit, on_error=on_error)
    found = read("answers", answers, labelled=True)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    if test is None or isinstance(test, float | int):
        num_test = _num_test(test, len(found), answers)
        tested, order = [found[i] for i in order[:num_test]], order[num_test:]
    else:
        tested = read("test", test, labelled=True)
    rest = [found[i] for i in order]
    if num_held_out is None:
        num_held_out = max(1, len(rest) // 5) if num_feedback is None else len(rest) - num_feedback
    num_feedback = len(rest) - num_held_out if num_feedback is None else num_feedback
    if min(num_feedback, num_held_out) < 1 or num_feedback + num_held_out > len(rest):
        raise MetaVPTError(
            f"data.answers={answers}: has {len(rest)} examples beside the tested ones, too few for "
            f"data.num_feedback={num_feedback} and data.num_held_out={num_held_out} (1 at least)"
        )
    documents = read("stream", stream)
    aside = {} if general is None else {"general": read("general", general)}
    say(
        "data:",
        f"{root.resolve().name}: {len(documents)} documents to train on, {num_feedback} answers "
        f"for feedback, {num_held_out} held out, {len(tested)} to evaluate on",
    )
    return LanguageData(
        stream={"text": Source(documents, domain=NAME)},
        feedback={NAME: rest},
        test={NAME: tested},
        general=aside,
        num_feedback=num_feedback,
        num_held_out=num_held_out,
        num_test=len(tested),
        num_general=len(aside.get("general", [])),
        benchmarks=benchmarks,
        on_error=on_error,
    )


def _num_test(share: float | None, total: int, answers: Places) -> int:
    if share is not None and not 0 < share < 1:
        raise MetaVPTError(f"data.test={share}: must be files, or a share in (0, 1)")
    num = max(1, round((share or 0.2) * total))
    if total - num < 2:
        raise MetaVPTError(
            f"data.answers={answers}: {total} examples are too few; feedback, held out and test "
            "need one each"
        )
    return num


def _documents(
    root: Path,
    key: str,
    places: Places,
    fields: Format,
    unit: str,
    on_error: str,
    labelled: bool = False,
) -> list[Document]:
    def convert(row: Mapping[str, Any], where: str) -> Document:
        plain = not labelled and PLAIN.answer in row
        return (PLAIN if plain else fields)(row, where)

    found: list[Document] = []
    for file in _files(root, key, places):
        if file.suffix in (".txt", ".md"):
            if labelled:
                raise MetaVPTError(
                    f"{file}: data.{key} are rows with a prompt and an answer, in .jsonl or .json"
                )
            found += PlainText(file, unit, on_error=on_error)
        else:
            found += JsonLines(file, convert, on_error=on_error)
    return found


def _files(root: Path, key: str, places: Places) -> list[Path]:
    """Find the files of places that are relative to `root`."""
    found: list[Path] = []
    for place in [places] if isinstance(places, str) else places:
        given = root / place
        if given.is_dir():
            files = sorted(file for file in given.rglob("*") if file.suffix in SUFFIXES)
        elif given.is_file():
            files = [given]
        else:
            files = [] if Path(place).is_absolute() else sorted(root.glob(place))
        if not files:
            raise MetaVPTError(
                f"data.{key}={place}: no such file, and no folder or pattern of "
                f"{', '.join(SUFFIXES)} files in {root}"
            )
        unknown = [file for file in files if file.suffix not in SUFFIXES]
        if unknown:
            raise MetaVPTError(f"{unknown[0]}: must be one of {', '.join(SUFFIXES)}")
        found += files
    return found
