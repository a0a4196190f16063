"""rows.jsonl: appended results are read back, the last one counts, a cut line is skipped."""

import errno
import multiprocessing as mp
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from metavpt import MetaVPTError
from metavpt.compare import results
from metavpt.compare.results import Result
from metavpt.training.streams import time_limit

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


def add(folder, text):
    with (folder / results.FILE).open("a") as file:
        file.write(text)


def test_a_last_line_cut_short_is_left_out_and_mended_by_the_next_append(tmp_path):
    results.append(tmp_path, FIRST)
    add(tmp_path, '{"row": "gre')
    said = []
    assert results.read(tmp_path, said.append) == [FIRST]
    second = Result("greedy", 1)
    results.append(tmp_path, second)
    assert results.read(tmp_path, said.append) == [FIRST, second]
    assert said == []
    assert len((tmp_path / results.FILE).read_text().splitlines()) == 2


BAD = {
    "cut": '{"row": "gre',
    "no object": "[1, 2]",
    "no row": '{"seed": 3}',
    "row of another type": '{"row": 3, "seed": 0}',
    "seed of another type": '{"row": "greedy", "seed": "0"}',
    "metric of another type": '{"row": "greedy", "seed": 0, "metrics": {"rmse": "low"}}',
    "metrics of another type": '{"row": "greedy", "seed": 0, "metrics": 3}',
    "not text": "\x00\x01",
    "nested without end": "[" * 100_000,
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_a_bad_line_is_named_and_left_out(tmp_path, line):
    results.append(tmp_path, FIRST)
    add(tmp_path, line + "\n")
    second = Result("greedy", 1)
    results.append(tmp_path, second)
    said = []
    assert results.read(tmp_path, said.append) == [FIRST, second]
    assert [f"{results.FILE} line 2" in text for text in said] == [True]


def test_a_full_disk_leaves_the_lines_before(tmp_path, monkeypatch):
    results.append(tmp_path, FIRST)
    before = (tmp_path / results.FILE).read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MetaVPTError, match=r"rows\.jsonl: cannot be written"):
        results.append(tmp_path, Result("greedy", 1))
    assert (tmp_path / results.FILE).read_bytes() == before


def test_results_of_several_processes_do_not_mix(tmp_path):
    with ProcessPoolExecutor(4, mp_context=mp.get_context("fork")) as pool:
        for seed in range(40):
            pool.submit(results.append, tmp_path, Result("row" * 1000, seed))
    assert sorted(result.seed for result in results.read(tmp_path)) == list(range(40))


def test_no_file_is_no_result(tmp_path):
    assert results.read(tmp_path) == []


GROWS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{k + 1}: &a{k + 1} {{<<: [*a{k}, *a{k}]}}\n" for k in range(24)
)


@pytest.mark.parametrize("text", ["rmse: [1, 2]", "rmse: {a: b}", "[1]", "a: [", "[" * 5000, GROWS])
def test_directions_of_another_form_are_one_line(tmp_path, text):
    (tmp_path / results.DIRECTIONS).write_text(text)
    with time_limit(60, "HANGS"), pytest.raises(MetaVPTError, match=results.DIRECTIONS) as raised:
        results.read_directions(tmp_path)
    assert len(str(raised.value)) < 400
