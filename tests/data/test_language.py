"""Data of a language problem: disjoint pools, domains, decontamination, and bad input."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from metavpt.data.arithmetic import Arithmetic
from metavpt.data.decontaminate import Benchmarks
from metavpt.data.gsm8k import read_word_problems
from metavpt.data.language import LanguageData, Source
from metavpt.data.text import open_documents
from metavpt.errors import MetaVPTError

CPU = torch.device("cpu")


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(part: str, limit: int | None = None) -> Arithmetic:
    return Arithmetic(
        part,
        {"chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}},
        limit=limit,
    )


def generated(**options: Any) -> LanguageData:
    pools: dict[str, Any] = {
        "feedback": {"math": sums("feedback", 12)},
        "test": {"answers": sums("test", 6)},
    }
    return LanguageData(
        {"sums": Source(sums("stream"))},
        **(pools | {"num_feedback": 8, "num_held_out": 4, "num_test": 6} | options),
    )


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """In the layout of GSM8K: the stream repeats one test question, in other letters."""
    problems = [
        {
            "question": f"Ann has {k} red and {k + 3} blue apples. How many in all?",
            "answer": f"#### {2 * k + 3}",
        }
        for k in range(20)
    ]
    write(tmp_path / "train.jsonl", problems[:12])
    write(tmp_path / "test.jsonl", problems[12:])
    stream = [
        {
            "problem": f"Prove claim number {k} about some primes, graphs and rings.",
            "solution": "so " * k,
        }
        for k in range(1, 9)
    ]
    stream.append({"problem": problems[12]["question"].upper(), "solution": "none"})
    write(tmp_path / "stream.jsonl", stream)
    return tmp_path


def from_files(folder: Path, **options: Any) -> LanguageData:
    documents = open_documents(
        folder / "stream.jsonl", {"question": ["problem"], "answer": "solution"}
    )
    return LanguageData(
        {"proofs": Source(documents)},
        {"math": read_word_problems(folder / "train.jsonl")},
        {"gsm8k": read_word_problems(folder / "test.jsonl")},
        num_feedback=8,
        num_held_out=4,
        num_test=8,
        path=str(folder),
        **options,
    )


def test_pool_held_out_and_test_share_no_question_with_each_other_or_the_stream() -> None:
    data = generated()
    parts = [
        {item.question for item in part}
        for part in (data.feedback["math"], data.held_out["math"], data.test["answers"])
    ]
    parts.append({document.question for document in islice(sums("stream"), 300)})
    assert [len(part) for part in parts[:3]] == [8, 4, 6]
    for i, part in enumerate(parts):
        assert not any(part & other for other in parts[i + 1 :])


def test_a_document_that_nearly_equals_a_test_question_is_left_out_and_reported(
    files: Path, tokenizer: Any, capsys: Any
) -> None:
    data = from_files(files, benchmarks=Benchmarks, report=str(files / "report"))
    assert len(data.encode(tokenizer, 64).components[0].documents) == 8  # type: ignore[arg-type]
    counts, match = (
        json.loads(line) for line in (files / "report" / "proofs.jsonl").read_text().splitlines()
    )
    assert (counts["read"], counts["removed"], counts["by_benchmark"]) == (
        9,
        1,
        {"feedback math": 0, "test gsm8k": 1},
    )
    assert (match["benchmark"], match["item"]) == ("test gsm8k", 0)
    assert (
        "proofs: 1 of 9 documents nearly equal a question of feedback or test"
        in capsys.readouterr().err
    )
    assert len(from_files(files).encode(tokenizer, 64).components[0].documents) == 9


def test_examples_resume_and_hold_every_domain(tokenizer: Any) -> None:
    data = generated(feedback={"math": sums("feedback", 12), "other": sums("feedback", 12)}).encode(
        tokenizer, 64
    )
    whole = list(islice(data.examples(data.feedback, 4, 3, CPU), 5))
    resumed = data.examples(data.feedback, 4, 3, CPU)
    resumed.skip(3)
    for batch, again in zip(whole[3:], resumed, strict=False):
        assert list(batch) == ["math", "other"]
        assert all(torch.equal(batch[name].tokens, again[name].tokens) for name in batch)


def test_a_meta_batch_has_rows_of_every_domain_with_feedback(tokenizer: Any) -> None:
    stream = {
        name: Source(sums("stream"), weight, name)
        for name, weight in (("math", 100.0), ("code", 1.0), ("general", 1.0))
    }
    feedback = {name: sums("feedback", 12) for name in ("math", "code")}
    data = LanguageData(
        stream, feedback, {"a": sums("test", 6)}, num_feedback=8, num_held_out=4, num_test=6
    ).encode(tokenizer, 64)
    assert data.domains == ["code", "general", "math"]
    whole = list(islice(data.packed_by_domain(5, 1, CPU), 4))
    for batch in whole:
        assert batch.domain.tolist() == [2, 2, 0, 0]
        assert batch.tokens.shape == (4, 64)
    resumed = data.packed_by_domain(5, 1, CPU)
    resumed.skip(2)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole[2:], resumed, strict=False))


def test_a_prompt_that_fills_a_row_ends_the_run_or_is_counted(
    files: Path, tokenizer: Any, capsys: Any
) -> None:
    with pytest.raises(
        MetaVPTError, match=r"stream\.jsonl, line \d+: the prompt has \d+ tokens.*raise the length"
    ):
        from_files(files).encode(tokenizer, 24)
    write(files / "train.jsonl", [{"question": f"{k}?", "answer": f"#### {k}"} for k in range(12)])
    write(
        files / "test.jsonl", [{"question": f"{k}?", "answer": f"#### {k}"} for k in range(12, 20)]
    )
    with (files / "stream.jsonl").open("a") as file:
        file.write('{"problem": "Why?", "solution": "so"}\n')
    assert (
        len(from_files(files, on_error="skip").encode(tokenizer, 24).components[0].documents) == 1
    )  # type: ignore[arg-type]
    assert (
        "proofs: 9 documents have a prompt that fills the 24 tokens of a row; they are left out"
        in capsys.readouterr().err
    )


BAD = {
    "no folder": (
        lambda f: LanguageData({}, {}, {}, path=str(f / "nowhere")),
        "data.path=.*nowhere: no such folder",
    ),
    "no test": (
        lambda f: LanguageData({"a": Source(sums("stream"))}, {"math": sums("feedback", 9)}, {}),
        "must each name a source",
    ),
    "small pool": (
        lambda f: generated(num_feedback=9),
        r"data\.feedback\.math: has 12 documents, fewer than .*= 13",
    ),
    "one name twice": (
        lambda f: generated(general={"answers": sums("test", 6)}),
        r"data\.general\.answers: data\.test has this name",
    ),
    "small test": (
        lambda f: generated(num_test=7),
        r"data\.test\.answers: has 6 documents, fewer than data\.num_test = 7",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_error(make: Any, message: str, files: Path) -> None:
    with pytest.raises(MetaVPTError, match=message):
        make(files)


def test_a_domain_with_feedback_must_be_in_the_stream(tokenizer: Any) -> None:
    data = generated(feedback={"math": sums("feedback", 12), "code": sums("feedback", 12)}).encode(
        tokenizer, 64
    )
    with pytest.raises(MetaVPTError, match="domains math, code: the stream has no domain 'code'"):
        data.packed_by_domain(8, 0, CPU)
    stream = {name: Source(sums("stream"), domain=name) for name in ("math", "code")}
    whole = LanguageData(
        stream, data_feedback(), {"a": sums("test", 6)}, num_feedback=8, num_held_out=4, num_test=6
    )
    with pytest.raises(MetaVPTError, match="meta_batch_size=1 has no row for each"):
        whole.encode(tokenizer, 64).packed_by_domain(1, 0, CPU)


def data_feedback() -> dict[str, Arithmetic]:
    return {"math": sums("feedback", 12), "code": sums("feedback", 12)}
