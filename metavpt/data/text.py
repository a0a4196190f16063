"""Documents from JSON lines, plain text and Hugging Face datasets."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from metavpt.errors import MetaVPTError, reading

Item = TypeVar("Item")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UNITS = ("paragraph", "line", "file")


class Document(NamedTuple):
    """A question with its answer, or plain text where `question` is empty.

    Losses are taken on the answer alone.
    """

    question: str
    answer: str
    where: str = ""  # file and line, for errors and reports


class BadRowError(ValueError):
    """What is wrong with a row; the reader adds where it stands."""


class Format(NamedTuple):
    """Which fields of a row make a document: those of `question`, joined by newlines, and `answer`.

    optional   question fields that may be missing, empty or null
    config     the configuration that the hub wants named, split: the part of the data set that is
    read
    """

    answer: str
    question: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: str | None = None
    split: str = "train"

    def __call__(self, row: Mapping[str, Any], where: str) -> Document:
        """Make a document of a row."""
        question = [text_field(row, name, name in self.optional) for name in self.question]
        return Document("\n".join(filter(None, question)), text_field(row, self.answer), where)


PLAIN = Format("text")
FORMATS = {
    "AI-MO/NuminaMath-CoT": Format("solution", ("problem",)),
    "nvidia/OpenMathReasoning": Format("generated_solution", ("problem",), split="cot"),
    "open-web-math/open-web-math": PLAIN,
    "meta-math/MetaMathQA": Format("response", ("query",)),
    "ise-uiuc/Magicoder-OSS-Instruct-75K": Format("solution", ("problem",)),
    "ise-uiuc/Magicoder-Evol-Instruct-110K": Format("response", ("instruction",)),
    "codeparrot/codeparrot-clean": Format("content"),
    "allenai/c4": Format("text", config="en"),
    "tatsu-lab/alpaca": Format("output", ("instruction", "input"), optional=("input",)),
    "openai/gsm8k": Format("answer", ("question",), config="main"),
    "plain": PLAIN,
}


def text_field(row: Mapping[str, Any], name: str, optional: bool = False) -> str:
    """Return the stripped text of a field, or "" for an optional one that is missing or null."""
    value = row.get(name)
    if value is None and optional:
        return ""
    if name not in row:
        raise BadRowError(f"no field {name!r} (it has {', '.join(map(repr, row)) or 'none'})")
    if not isinstance(value, str):
        raise BadRowError(f"field {name!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise BadRowError(f"field {name!r} is not valid Unicode") from None
    if not value.strip() and not optional:
        raise BadRowError(f"field {name!r} is empty")
    return value.strip()


class Rows(ABC, Generic[Item]):
    """The rows of one source, converted by `convert(row, where)`. They can be read repeatedly.

    Args:
        name: The source.
        convert: Converts a row.
        on_error: "raise": a row that cannot be read is an error with its file and line. "skip": it
            is left out, and `skipped` lists it.
        limit: The limit on items after the skipped ones.
        start: Items to skip, so that one file can serve two purposes.
    """

    def __init__(
        self,
        name: str,
        convert: Callable[[Mapping[str, Any], str], Item],
        on_error: str = "raise",
        limit: int | None = None,
        start: int = 0,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise MetaVPTError(f"{name}: on_error={on_error!r} must be 'raise' or 'skip'")
        if limit is not None and limit < 1:
            raise MetaVPTError(
                f"{name}: limit={limit} must be 1 or more; leave it out to read everything"
            )
        if start < 0:
            raise MetaVPTError(f"{name}: start={start} must not be negative")
        self.name, self.convert, self.on_error, self.limit, self.start = (
            name,
            convert,
            on_error,
            limit,
            start,
        )
        self.skipped: dict[str, str] = {}

    def __iter__(self) -> Iterator[Item]:
        count = 0
        for where, raw in self._raw_rows():
            try:
                item = self.convert(self._decode(raw), where)
            except BadRowError as reason:
                if self.on_error == "raise":
                    raise MetaVPTError(
                        f"{where}: {reason}; repair the row, or set on_error=skip to leave such "
                        "rows out"
                    ) from None
                self.skipped[where] = str(reason)
                continue
            count += 1
            if count <= self.start:
                continue
            yield item
            if self.limit is not None and count == self.start + self.limit:
                return
        if count <= self.start:
            left_out = f"{len(self.skipped)} rows were skipped" + (
                f", {count} come before start={self.start}" if self.start else ""
            )
            raise MetaVPTError(
                f"{self.name}: the stream is empty ({left_out}); name a source with rows"
            )

    @abstractmethod
    def _raw_rows(self) -> Iterator[tuple[str, Any]]:
        """Where each row stands, and the row as it was read."""

    def _decode(self, raw: Any) -> Mapping[str, Any]:
        return raw


class JsonLines(Rows[Item]):
    """One JSON object a line, in UTF-8; empty lines are no rows.

    A file that ends in .json is one array of objects.
    """

    def __init__(
        self, path: str | Path, convert: Callable[[Mapping[str, Any], str], Item], **options: Any
    ) -> None:
        super().__init__(str(path), convert, **options)
        self.path = Path(path)

    def _raw_rows(self) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
        if self.path.suffix == ".json":
            rows = _json(_whole(self.path), f"{self.path}: ")
            if not isinstance(rows, list):
                raise MetaVPTError(
                    f"{self.path}: not an array of objects; name a file of JSON lines .jsonl"
                )
            yield from ((f"{self.path}, row {k}", row) for k, row in enumerate(rows, 1))
            return
        for number, line in enumerate(_lines(self.path), 1):
            if line.strip():
                yield f"{self.path}, line {number}", line

    def _decode(self, raw: Any) -> Mapping[str, Any]:
        row = _json(raw) if isinstance(raw, bytes) else raw
        if not isinstance(row, dict):
            raise BadRowError(f"a JSON {type(row).__name__}, not an object")
        return row


class PlainText(Rows[Document]):
    """Yield a document per paragraph of a UTF-8 text file, per line, or for the whole of it."""

    def __init__(self, path: str | Path, unit: str = "paragraph", **options: Any) -> None:
        super().__init__(str(path), PLAIN, **options)
        if unit not in UNITS:
            raise MetaVPTError(f"{path}: unit={unit!r} must be one of {', '.join(UNITS)}")
        self.path, self.unit = Path(path), unit

    def _raw_rows(self) -> Iterator[tuple[str, bytes]]:
        held: list[bytes] = []
        first = 1
        for number, line in enumerate(_lines(self.path), 1):
            blank = not line.strip()
            if not blank or (held and self.unit == "file"):
                first = first if held else number
                held.append(line)
            if held and (self.unit == "line" or (self.unit == "paragraph" and blank)):
                yield f"{self.path}, line {first}", b"".join(held)
                held = []
        if held:
            yield f"{self.path}, line {first}", b"".join(held)

    def _decode(self, raw: Any) -> Mapping[str, Any]:
        return {"text": _utf8(raw)}


class HubDataset(Rows[Item]):
    """A Hugging Face data set by its hub name or a local folder.

    The folder is one of `save_to_disk`, or of data files.

    Args:
        name: The name or folder.
        convert: Converts a row.
        config: As the hub names it. None: that of `convert`, if it is a `Format`.
        split: The same.
        streaming: Whether rows are fetched as they are read, without storing them.
    """

    def __init__(
        self,
        name: str,
        convert: Callable[[Mapping[str, Any], str], Item],
        config: str | None = None,
        split: str | None = None,
        streaming: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(name, convert, **options)
        known = convert if isinstance(convert, Format) else PLAIN
        self.config, self.split, self.streaming = (
            config or known.config,
            split or known.split,
            streaming,
        )

    def _raw_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with reading(
            f"{self.name}: the data set cannot be read", "check its name, config and split"
        ):  # also in the middle
            for number, row in enumerate(self._load(), 1):
                yield f"{self.name}, row {number}", row

    def _load(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise MetaVPTError(
                f"{self.name}: Hugging Face data sets need the package datasets: pip install "
                "'metavpt[language]'"
            ) from None
        if (Path(self.name) / "dataset_dict.json").exists():
            return datasets.load_from_disk(self.name)[self.split]
        if (Path(self.name) / "state.json").exists():
            return datasets.load_from_disk(self.name)
        config = None if Path(self.name).is_dir() else self.config  # a folder of files has none
        return datasets.load_dataset(self.name, config, split=self.split, streaming=self.streaming)


def open_documents(
    name: str | Path, format: str | Mapping[str, Any] | Format | None = None, **options: Any
) -> Rows[Document]:
    """Documents of a .jsonl or .json file, a text file, a local folder, or a data set of the hub.

    format    a name in FORMATS, or the fields {answer: ..., question: [...]}; None: that of the hub
    name, plain text for others options   of `JsonLines`, `PlainText` or `HubDataset`
    """
    path, chosen = Path(name), document_format(str(name), format)
    if path.suffix in (".jsonl", ".json"):
        return JsonLines(path, chosen, **options)
    if path.is_file() or path.suffix in (".txt", ".md"):
        return PlainText(path, **options)
    return HubDataset(str(name), chosen, **options)


def document_format(name: str, format: str | Mapping[str, Any] | Format | None) -> Format:
    """The fields of the documents in `name`, see `open_documents`."""
    if isinstance(format, Format):
        return format
    if isinstance(format, Mapping):
        fields: dict[str, Any] = {
            key: tuple(value) if key in ("question", "optional") else value
            for key, value in format.items()
        }
        if "answer" not in fields or not fields.keys() <= set(Format._fields):
            raise MetaVPTError(
                f"{name}: format needs `answer` and may have {', '.join(Format._fields[1:])}; it "
                f"is {dict(format)}"
            )
        return Format(**fields)
    if format is not None and format not in FORMATS:
        raise MetaVPTError(
            f"{name}: format={format!r} is unknown; use one of {', '.join(FORMATS)}, or name the "
            "fields"
        )
    return FORMATS.get(format or name, PLAIN)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from (
                line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line
                for number, line in enumerate(file)
            )
    except OSError as error:
        raise MetaVPTError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _whole(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MetaVPTError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise MetaVPTError(f"{path}: invalid UTF-8 (byte {error.start}); repair the file") from None


def _utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRowError(f"invalid UTF-8 (byte {error.start})") from None


def _json(raw: bytes | str, prefix: str = "") -> Any:
    try:
        return json.loads(raw if isinstance(raw, str) else _utf8(raw))
    except BadRowError as error:
        reason = str(error)
    except (
        ValueError,
        RecursionError,
    ) as error:  # broken, a number of thousands of digits, nested without end
        reason = f"broken JSON ({error})"
    if prefix:
        raise MetaVPTError(f"{prefix}{reason}; repair the file")
    raise BadRowError(reason)
