import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from metavpt.data.text import (
    FORMATS,
    PLAIN,
    Document,
    Format,
    HubDataset,
    JsonLines,
    PlainText,
    open_documents,
)
from metavpt.errors import MetaVPTError

# rows as the hub shows them, with the document that each must become
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "AI-MO/NuminaMath-CoT": (
        {
            "source": "synthetic_math",
            "problem": "What is 2+2?",
            "solution": "It is $\\boxed{4}$.",
            "messages": [{"role": "user"}],
        },
        "What is 2+2?",
        "It is $\\boxed{4}$.",
    ),
    "nvidia/OpenMathReasoning": (
        {
            "expected_answer": "4",
            "problem_type": "has_answer_extracted",
            "problem": "2+2?",
            "generated_solution": "<think>4</think>4",
        },
        "2+2?",
        "<think>4</think>4",
    ),
    "open-web-math/open-web-math": (
        {"url": "http://a", "text": "A page.", "date": "2020", "metadata": "{}"},
        "",
        "A page.",
    ),
    "meta-math/MetaMathQA": (
        {
            "type": "GSM_Rephrased",
            "query": "How many?",
            "original_question": "?",
            "response": "The answer is: 3",
        },
        "How many?",
        "The answer is: 3",
    ),
    "ise-uiuc/Magicoder-OSS-Instruct-75K": (
        {
            "lang": "python",
            "raw_index": 1,
            "index": 2,
            "seed": "x",
            "problem": "Write f.",
            "solution": "```python\n```",
        },
        "Write f.",
        "```python\n```",
    ),
    "ise-uiuc/Magicoder-Evol-Instruct-110K": (
        {"instruction": "Write g.", "response": "def g(): ..."},
        "Write g.",
        "def g(): ...",
    ),
    "codeparrot/codeparrot-clean": (
        {"repo_name": "a/b", "path": "c.py", "size": "9", "content": "import os"},
        "",
        "import os",
    ),
    "allenai/c4": (
        {"text": "Web text.", "timestamp": "2019-04-25T12:57:54Z", "url": "https://a"},
        "",
        "Web text.",
    ),
    "tatsu-lab/alpaca": (
        {
            "instruction": "Name the colour.",
            "input": "grass",
            "output": "Green.",
            "text": "Below is",
        },
        "Name the colour.\ngrass",
        "Green.",
    ),
    "openai/gsm8k": (
        {"question": "How many?", "answer": "2+1 = <<2+1=3>>3\n#### 3"},
        "How many?",
        "2+1 = <<2+1=3>>3\n#### 3",
    ),
    "plain": ({"text": "Prose."}, "", "Prose."),
}


def write_rows(path: Path, *rows: dict[str, Any] | bytes) -> Path:
    path.write_bytes(
        b"".join(
            (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
        )
    )
    return path


def test_every_known_format_has_a_row_here():
    assert ROWS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_formats_of_known_data_sets(name: str, tmp_path: Path):
    row, question, answer = ROWS[name]
    path = write_rows(tmp_path / "rows.jsonl", row, row)
    assert list(open_documents(path, name)) == [
        Document(question, answer, f"{path}, line {k}") for k in (1, 2)
    ]


def test_alpaca_without_an_input():
    for row in (
        {"instruction": "Go.", "input": "", "output": "Gone."},
        {"instruction": "Go.", "input": None, "output": "Gone."},
    ):
        assert FORMATS["tatsu-lab/alpaca"](row, "here") == Document("Go.", "Gone.", "here")


def test_fields_can_be_named(tmp_path: Path):
    path = write_rows(tmp_path / "own.jsonl", {"q": " Why? ", "hint": "Think.", "a": "Because.\n"})
    rows = open_documents(path, {"question": ["q", "hint"], "answer": "a"})
    assert list(rows) == [Document("Why?\nThink.", "Because.", f"{path}, line 1")]
    with pytest.raises(MetaVPTError, match=r"own\.jsonl: format needs `answer`"):
        open_documents(path, {"question": ["q"]})
    with pytest.raises(MetaVPTError, match="format='numina' is unknown"):
        open_documents(path, "numina")


def test_json_arrays_byte_order_marks_and_empty_lines(tmp_path: Path):
    array = tmp_path / "rows.json"
    array.write_text(json.dumps([{"text": "one"}, {"text": "two"}]), encoding="utf-8")
    assert [document.answer for document in open_documents(array)] == ["one", "two"]
    marked = write_rows(
        tmp_path / "marked.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"text": "é"}).encode(),
        b"",
        {"text": "two"},
    )
    assert list(open_documents(marked)) == [
        Document("", "é", f"{marked}, line 1"),
        Document("", "two", f"{marked}, line 3"),
    ]
    array.write_text("[{]")
    with pytest.raises(MetaVPTError, match=r"rows\.json: broken JSON"):
        list(open_documents(array))
    array.write_text("{}")
    with pytest.raises(MetaVPTError, match=r"rows\.json: not an array"):
        list(open_documents(array))


BAD = [
    (b'{"text": "cut of', "broken JSON"),
    (b'{"text": "caf\xe9"}', r"invalid UTF-8 \(byte 13\)"),
    (b'{"txt": "a"}', r"no field 'text' \(it has 'txt'\)"),
    (b'{"text": 3}', "field 'text' is int, not text"),
    (b'{"text": "  "}', "field 'text' is empty"),
    (b'{"text": "\\ud800"}', "field 'text' is not valid Unicode"),
    (b"[1, 2]", "a JSON list, not an object"),
    (b"[" * 100_000, "broken JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_bad_rows_raise_or_are_counted(line: bytes, reason: str, tmp_path: Path):
    path = write_rows(tmp_path / "bad.jsonl", {"text": "first"}, line, {"text": "third"})
    with pytest.raises(MetaVPTError, match=rf"bad\.jsonl, line 2: {reason}.*on_error=skip"):
        list(JsonLines(path, PLAIN))
    rows = JsonLines(path, PLAIN, on_error="skip")
    for _ in range(2):  # a second pass counts nothing twice
        assert [document.answer for document in rows] == ["first", "third"]
        assert list(rows.skipped) == [f"{path}, line 2"]


def test_empty_streams_and_options(tmp_path: Path):
    path = write_rows(tmp_path / "bad.jsonl", b"{", b"}")
    with pytest.raises(
        MetaVPTError, match=r"bad\.jsonl: the stream is empty \(2 rows were skipped\)"
    ):
        list(JsonLines(path, PLAIN, on_error="skip"))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(MetaVPTError, match=r"empty\.txt: the stream is empty"):
        list(open_documents(tmp_path / "empty.txt"))
    for name in ("no.jsonl", "no.txt"):
        with pytest.raises(MetaVPTError, match=rf"{name}: cannot be read \(No such file"):
            list(open_documents(tmp_path / name))
    with pytest.raises(MetaVPTError, match="on_error='ignore' must be"):
        open_documents(path, on_error="ignore")
    with pytest.raises(MetaVPTError, match="limit=0 must be 1 or more"):
        open_documents(path, limit=0)
    good = write_rows(tmp_path / "good.jsonl", *({"text": str(k)} for k in range(9)))
    assert len(list(open_documents(good, limit=4))) == 4
    everything = list(open_documents(good))
    assert list(open_documents(good, start=1, limit=2)) == everything[1:3]
    with pytest.raises(
        MetaVPTError,
        match=rf"the stream is empty \(0 rows were skipped, {len(everything)} come before "
        r"start=100\)",
    ):
        list(open_documents(good, start=100))
    with pytest.raises(MetaVPTError, match="start=-1 must not be negative"):
        open_documents(good, start=-1)


def test_units_of_plain_text(tmp_path: Path):
    path = tmp_path / "prose.txt"
    path.write_bytes(b"\n \nOne.\nStill one.\n \n\nTwo.\n")
    assert list(PlainText(path)) == [
        Document("", "One.\nStill one.", f"{path}, line 3"),
        Document("", "Two.", f"{path}, line 7"),
    ]
    assert [document.answer for document in PlainText(path, unit="line")] == [
        "One.",
        "Still one.",
        "Two.",
    ]
    assert [document.answer for document in PlainText(path, unit="file")] == [
        "One.\nStill one.\n \n\nTwo."
    ]
    with pytest.raises(MetaVPTError, match="unit='page' must be one of"):
        PlainText(path, unit="page")
    path.write_bytes(b"Fine.\n\nNot \xff fine.\n\nFine again.")
    with pytest.raises(MetaVPTError, match=r"prose\.txt, line 3: invalid UTF-8 \(byte 4\)"):
        list(PlainText(path))
    rows = PlainText(path, on_error="skip")
    assert [document.answer for document in rows] == ["Fine.", "Fine again."]
    assert rows.skipped == {f"{path}, line 3": "invalid UTF-8 (byte 4)"}


def test_hugging_face_data_sets_in_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"problem": f"{k}+1?", "solution": f"{k + 1}"} for k in range(5)]
    documents = [(f"{k}+1?", f"{k + 1}") for k in range(5)]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "saved_dict")
    (tmp_path / "files").mkdir()
    with gzip.open(tmp_path / "files" / "train.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    for folder in ("saved", "saved_dict", "files"):
        found = open_documents(tmp_path / folder, "AI-MO/NuminaMath-CoT")
        assert isinstance(found, HubDataset)
        assert (
            [document[:2] for document in found]
            == documents
            == [document[:2] for document in found]
        )
    with pytest.raises(
        MetaVPTError, match=r"saved, row 1: no field 'text' \(it has 'problem', 'solution'\)"
    ):
        list(open_documents(tmp_path / "saved"))
    with pytest.raises(MetaVPTError, match="files: the data set cannot be read"):
        list(open_documents(tmp_path / "files", split="test"))


def test_hub_names_bring_their_format_config_and_split():
    c4, reasoning = (
        open_documents("allenai/c4"),
        open_documents("nvidia/OpenMathReasoning", split="tir"),
    )
    assert isinstance(c4, HubDataset)
    assert isinstance(reasoning, HubDataset)
    assert (c4.convert, c4.config, c4.split) == (PLAIN._replace(config="en"), "en", "train")
    assert (reasoning.convert.answer, reasoning.config, reasoning.split) == (
        "generated_solution",
        None,
        "tir",
    )  # type: ignore[attr-defined]


@pytest.mark.shared_data
def test_real_files(shared_data: Path):
    found = {
        name: len(
            list(
                open_documents(
                    shared_data / "mathtext" / f"{name}.jsonl", Format("solution", ("problem",))
                )
            )
        )
        for name in ("math_test", "mathqa_test", "ocw_test", "aqua_dev_test")
    }
    assert found == {"math_test": 5000, "mathqa_test": 1000, "ocw_test": 272, "aqua_dev_test": 508}
    for name in ("tinyshakespeare", "wikitext2_test", "wikitext2_valid"):
        path = shared_data / "generaltext" / f"{name}.txt"
        paragraphs = list(open_documents(path))
        assert len(paragraphs) > 500
        assert sum(len(document.answer.split()) for document in paragraphs) == len(
            path.read_text(encoding="utf-8").split()
        )
