"""rows.jsonl: what was appended is read back, the last word on a row holds, a cut line is left out."""

import pytest

from metavpt import MetaVPTError
from metavpt.compare import results
from metavpt.compare.results import Result

FIRST = Result(
    "fixed",
    0,
    step0={"rmse": 2.0},
    metrics={"rmse": 1.0},
    steps=4,
    samples=8,
    grad_evals=4,
    seconds=2.0,
    steered=["rmse"],
)


def test_results_are_read_back_and_a_later_one_replaces_a_failure(tmp_path):
    results.append(tmp_path, Result("greedy", 0, error="no candidates"))
    results.append(tmp_path, FIRST)
    results.append(tmp_path, Result("greedy", 0, metrics={"rmse": 3.0}))
    assert results.read(tmp_path) == [Result("greedy", 0, metrics={"rmse": 3.0}), FIRST]
    assert FIRST.samples_per_s == 4.0


def test_a_last_line_cut_short_is_left_out_and_another_bad_line_is_an_error(tmp_path):
    results.append(tmp_path, FIRST)
    with (tmp_path / results.FILE).open("a") as file:
        file.write('{"row": "gre')
    assert results.read(tmp_path) == [FIRST]
    with (tmp_path / results.FILE).open("a") as file:
        file.write("\n")
    results.append(tmp_path, FIRST)
    with pytest.raises(MetaVPTError, match="line 2"):
        results.read(tmp_path)


def test_no_file_is_no_result(tmp_path):
    assert results.read(tmp_path) == []
