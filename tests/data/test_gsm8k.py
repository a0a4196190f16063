import json
from pathlib import Path
from typing import Any

import pytest

from metavpt.data.gsm8k import WordProblem, read_word_problems, word_problem
from metavpt.data.text import BadRowError, Document
from metavpt.errors import MetaVPTError

ROW = {
    "question": "Natalia sold 48 clips in April, and half as many in May. How many?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "She sold 48+24 = $<<48+24=72>>72 in all.\n"
    "#### 72",
}


def test_calculator_annotations_are_removed_or_kept():
    problem = word_problem(ROW, "here")
    assert problem.solution == "She sold 48/2 = 24 clips in May.\nShe sold 48+24 = $72 in all."
    assert problem.document == Document(ROW["question"], f"{problem.solution}\n#### 72", "here")
    assert word_problem(ROW, "here", annotations=True).document == Document(
        ROW["question"], ROW["answer"], "here"
    )


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        (
            {"Body": "Ann has 3 hats.", "Question": "How many?", "Answer": 3.0, "Equation": "3"},
            "Ann has 3 hats. How many?",
            "3",
        ),
        (
            {"Body": "There are 8 cats in a box", "Question": "How many?", "Answer": "8"},
            "There are 8 cats in a box. How many?",
            "8",
        ),
        ({"problem": "Joan found 70.", "answer": 43.0, "type": "singleeq"}, "Joan found 70.", "43"),
        ({"problem": "Half of 1?", "answer": 0.5}, "Half of 1?", "0.5"),
    ],
)
def test_layouts_without_steps_have_the_answer_alone(
    row: dict[str, Any], question: str, answer: str
):
    problem = word_problem(row, "here")
    assert problem == WordProblem(question, "", answer, "here")
    assert problem.document.answer == f"#### {answer}"


@pytest.mark.parametrize(
    ("final", "answer"),
    [
        ("1,600", "1600"),
        ("$5.50", "5.50"),
        ("-7", "-7"),
        ("10.00", "10"),
        ("12.", "12"),
        ("100", "100"),
        (".5", ".5"),
        (".0", ".0"),
    ],
)
def test_final_answers(final: str, answer: str):
    assert word_problem({"question": "?", "answer": f"so\n#### {final}"}, "here").answer == answer


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "?", "answer": "72"}, "no final answer after ####"),
        ({"question": "?", "answer": "#### many"}, "' many' in field 'answer' is no number"),
        ({"question": "?"}, "no field 'answer'"),
        ({"problem": "?", "answer": "A"}, "'A' in field 'answer' is no number"),
        ({"problem": "?", "answer": None}, "None in field 'answer' is no number"),
        ({"Body": "x", "Question": "?"}, "no field 'Answer'"),
        ({"text": "x"}, r"no field 'question' \(it has 'text'\)"),
    ],
)
def test_bad_rows(row: dict[str, Any], reason: str, tmp_path: Path):
    with pytest.raises(BadRowError, match=reason):
        word_problem(row, "here")
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(MetaVPTError, match=rf"problems\.jsonl, line 2: .*{reason}"):
        list(read_word_problems(path))
    problems = read_word_problems(path, on_error="skip")
    assert [problem.answer for problem in problems] == ["72"]
    assert list(problems.skipped) == [f"{path}, line 2"]


def test_svamp_as_it_is_released(tmp_path: Path):
    path = tmp_path / "SVAMP.json"
    path.write_text(
        json.dumps(
            [
                {
                    "ID": "chal-1",
                    "Body": "Each pack costs 76 dollars.",
                    "Question": "How much is 1?",
                    "Answer": 76.0,
                }
            ]
        )
    )
    assert list(read_word_problems(path)) == [
        WordProblem("Each pack costs 76 dollars. How much is 1?", "", "76", f"{path}, row 1")
    ]


@pytest.mark.shared_data
def test_real_problems(shared_data: Path):
    train = list(read_word_problems(shared_data / "gsm8k" / "train.jsonl"))
    test = list(read_word_problems(shared_data / "gsm8k" / "test.jsonl"))
    mawps = list(read_word_problems(shared_data / "mathtext" / "mawps_test.jsonl"))
    assert (len(train), len(test), len(mawps)) == (7473, 659, 2065)
    assert train[0].answer == "72"
    assert not any("<<" in problem.solution or "####" in problem.solution for problem in train)
    assert all(problem.solution for problem in train + test)
    kept = read_word_problems(shared_data / "gsm8k" / "train.jsonl", annotations=True, limit=50)
    assert sum("<<" in problem.solution for problem in kept) > 45
