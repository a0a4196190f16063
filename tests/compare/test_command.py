"""A whole comparison on a toy with a known answer: rows, fairness, budgets, resume, bad input."""

import json
import multiprocessing as mp
import os
import shlex
import shutil
import time
from functools import partial
from typing import NamedTuple

import pytest
import torch
from helpers import command_process
from helpers.telling import telling

from metavpt.compare import results
from metavpt.compare.runner import Comparison, Job
from metavpt.report.rows import run_folder

LEARNED = ["strategy.optimizer.lr=0.1", "strategy.burn_in=0"]
ROWS = (
    "strategies=[one_step,unrolled,implicit,{again:fixed},"
    "{still:'one_step strategy.optimizer.lr=0'}]"
)
SMALL = [
    *("controls=[]", "strategies=[fixed,{longer: 'fixed budget.steps=7'}]"),
    *("match=steps", "budget.steps=4"),
]


SEEDS = range(2)


class Done(NamedTuple):
    """A finished command: its status and all that it printed."""

    returncode: int
    printed: str


def arguments(folder, *options):
    return ["problem=toy_sources", "jobs=2", f"output={folder}", *options]


def compare(folder, *options):
    folder.parent.mkdir(exist_ok=True)
    return Done(
        *command_process.finish(
            folder.parent,
            *arguments(folder, *options),
            module="compare",
            seconds=900,
            environment={"OMP_NUM_THREADS": "1"},
        )
    )


def error_of(done):
    """The one line of a bad input."""
    assert done.returncode == 2, done.printed
    (line,) = done.printed.strip().splitlines()
    return line


def learner(folder, row, seed):
    newest = max((folder / "rows" / row / f"seed{seed}" / "checkpoints").glob("step-*.pt"))
    return torch.load(newest, weights_only=True)["problem"]["learner"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every row on every seed, and what the command printed."""
    folder = tmp_path_factory.mktemp("toy") / "comparison"
    done = compare(folder, ROWS, f"seeds={list(SEEDS)}", *LEARNED)
    assert done.returncode == 0, done.printed
    return folder, done.printed


@pytest.fixture(scope="module")
def found(finished):
    folder, _ = finished
    return {(result.row, result.seed): result for result in results.read(folder)}


def test_learned_designers_beat_greedy_which_beats_fixed_on_every_seed(found):
    for seed in SEEDS:
        error = {
            row: found[row, seed].metrics["error"]
            for row in ("fixed", "greedy", "one_step", "unrolled", "implicit")
        }
        assert (
            max(error["one_step"], error["unrolled"], error["implicit"]) < 0.5 * error["greedy"]
        ), error
        assert error["greedy"] < 0.5 * error["fixed"], error


def test_the_rows_that_are_always_there(found):
    assert {row for row, _ in found} == {
        *("fixed", "random_feedback", "uniform", "greedy", "labels_only", "direct"),
        *("one_step", "unrolled", "implicit", "again", "still"),
    }
    assert all(result.error is None for result in found.values())


@pytest.mark.parametrize("row", ["again", "still"])
def test_fixed_under_another_name_and_a_designer_of_lr_0_are_fixed_bit_for_bit(
    finished, found, row
):
    for seed in SEEDS:
        assert found[row, seed].metrics == found["fixed", seed].metrics
        ours, theirs = learner(finished[0], row, seed), learner(finished[0], "fixed", seed)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rows_of_a_seed_share_step_0_and_seeds_do_not(found):
    step0 = {
        seed: {json.dumps(result.step0) for (_, s), result in found.items() if s == seed}
        for seed in SEEDS
    }
    assert all(len(values) == 1 for values in step0.values())
    assert len(set.union(*step0.values())) == len(SEEDS)


def test_steps_are_exact_and_costs_are_charged(found):
    assert {result.steps for result in found.values()} == {300}
    assert {r.samples for (row, _), r in found.items() if row != "labels_only"} == {300 * 64}
    fixed, one_step, greedy = (found[row, 0].grad_evals for row in ("fixed", "one_step", "greedy"))
    assert fixed == 300
    updates = 300 // 8 + 1
    # g_down on a quarter of a batch, g_pre for the cosine, two losses of the difference product,
    # from which the way back to the weights of sources does not pass the learner
    assert one_step == pytest.approx(300 + updates * (1 / 4 + 1 + 2 / 3))
    # 8 candidates a step, two forward passes for each
    assert greedy == pytest.approx(300 + updates / 4 + 300 * 8 * 2 / 3)
    assert all(result.peak_memory > 2**20 and result.seconds > 0 for result in found.values())


def test_the_table_and_the_report_are_written_and_printed(finished):
    folder, printed = finished
    assert "step 0" in printed
    assert "implicit" in printed
    assert (folder / "table.md").read_text().count("implicit") >= 2
    assert "one_step" in (folder / "table.csv").read_text()
    environment = json.loads((folder / "environment.json").read_text())
    assert "strategy.optimizer.lr=0.1" in environment["command"]
    assert "seeds=[0, 1]" in shlex.split(environment["command"])  # may be typed as it stands
    row = json.loads((folder / "rows" / "one_step" / "seed1" / "environment.json").read_text())
    assert row["threads"] == max(1, (os.cpu_count() or 1) // 2)  # two jobs at a time
    assert (folder / "report.html").stat().st_size > 10_000
    assert (folder / "rows" / "one_step" / "seed1" / "report.html").is_file()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two rows of a few steps, the second with a budget of its own."""
    folder = tmp_path_factory.mktemp("small") / "c"
    done = compare(folder, *SMALL, "seeds=[0]", "metrics={error: higher}")
    assert done.returncode == 0, done.printed
    return folder


def test_a_row_may_have_a_budget_of_its_own(small):
    assert {result.row: result.steps for result in results.read(small)} == {"fixed": 4, "longer": 7}
    assert "2 rows, seed 0." in (small / "report.html").read_text()  # not "at equal steps"


def test_resuming_a_finished_comparison_reruns_nothing_and_new_seeds_are_added(small, tmp_path):
    before = (small / "rows.jsonl").read_text()
    shutil.copytree(small, tmp_path / "c")
    done = compare(tmp_path / "c", *SMALL, "seeds=[0,1]", "resume=true")
    assert done.returncode == 0, done.printed
    after = (tmp_path / "c" / "rows.jsonl").read_text()
    assert after.startswith(before)
    assert sorted((result.row, result.seed) for result in results.read(tmp_path / "c")) == [
        *(("fixed", 0), ("fixed", 1), ("longer", 0), ("longer", 1)),
    ]


def test_a_direction_on_the_command_line_holds_and_may_change_when_the_comparison_goes_on(
    small, tmp_path
):
    assert "error (higher is better)" in (small / "table.md").read_text()
    shutil.copytree(small, tmp_path / "c")
    done = compare(tmp_path / "c", *SMALL, "seeds=[0]", "metrics={error: lower}", "resume=true")
    assert done.returncode == 0, done.printed
    assert "error (lower is better)" in (tmp_path / "c" / "table.md").read_text()
    assert (tmp_path / "c" / "rows.jsonl").read_text() == (small / "rows.jsonl").read_text()


def test_the_folder_of_another_comparison_is_left_alone(small):
    options = [*SMALL, "seeds=[0]", "metrics={error: higher}"]
    files = {path: path.read_bytes() for path in small.rglob("*") if path.is_file()}
    assert "not empty" in error_of(compare(small, *options))
    for other in (["problem.noise=3"], ["strategies=[fixed]", "match=samples", "budget.samples=9"]):
        assert "another configuration" in error_of(compare(small, *options, "resume=true", *other))
    assert {path: path.read_bytes() for path in small.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("killed", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_an_interrupted_comparison_goes_on_to_the_same_numbers(found, tmp_path, killed):
    """Stopped by SIGTERM it prints the command that continues it; killed it prints nothing."""
    options = ["controls=[fixed]", "strategies=[one_step]", "seeds=[0,1]", *LEARNED]
    options += ["trainer.checkpoint_every=20"]
    running = command_process.start(
        tmp_path,
        *arguments(tmp_path / "cut", *options),
        module="compare",
        environment={"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while (
        not list((tmp_path / "cut").glob("rows/*/seed0/checkpoints/step-*.pt"))
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    (running.kill if killed else running.terminate)()
    running.join(60)
    printed = (tmp_path / "output.txt").read_text()
    cut = {(result.row, result.seed) for result in results.read(tmp_path / "cut")}
    assert len(cut) < 4
    again = ["python", "-m", "metavpt.compare"]
    if killed:
        again += arguments(tmp_path / "cut", *options, "resume=true")
    else:
        assert running.exitcode == 0  # as a scheduler expects that starts it again
        assert shlex.split(printed.splitlines()[-1])[:3] == again
        again = shlex.split(printed.splitlines()[-1])
    (tmp_path / "output.txt").unlink()
    done = Done(*command_process.finish(tmp_path, *again[3:], module="compare", seconds=900))
    assert done.returncode == 0, done.printed
    went_on = {(result.row, result.seed): result for result in results.read(tmp_path / "cut")}
    assert went_on.keys() == {(row, seed) for row in ("fixed", "one_step") for seed in (0, 1)}
    for job, result in went_on.items():
        for name in ("metrics", "steps", "samples", "grad_evals"):
            assert getattr(result, name) == getattr(found[job], name), (job, name)


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """Rows of equal seconds, the learned one repeated over a key."""
    folder = tmp_path_factory.mktemp("timed") / "c"
    done = compare(
        folder,
        *("controls=[fixed]", "strategies=[one_step]", "vary={problem.noise:[0.5,2]}"),
        *("seeds=[0]", "match=seconds", "budget.seconds=0.5", "trainer.log_every=1"),
    )
    assert done.returncode == 0, done.printed
    return folder


def test_a_budget_in_seconds_ends_with_the_step_that_reaches_it(timed):
    for result in results.read(timed):
        log = (run_folder(timed, result.row, 0) / "metrics.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, log) if record["kind"] == "train"]
        seconds = [record["seconds"] for record in records]
        assert len(seconds) == result.steps
        assert seconds[-2] < 0.5 <= result.seconds
        counted = sum(value for name, value in result.times.items() if name != "probe")
        assert abs(counted - result.seconds) < 1e-9


def test_rows_are_repeated_over_the_values_of_a_key(timed):
    assert sorted(result.row for result in results.read(timed)) == [
        *("fixed", "one_step problem.noise=0.5", "one_step problem.noise=2"),
    ]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Rows from a trained warm start, four of which fail: what was printed, and the results."""
    folder = tmp_path_factory.mktemp("warm") / "c"
    rows = {
        "three": "one_step problem.num_sources=3",  # another shape of phi
        "broken": "one_step +strategy.estimator.num_batches=0",
        "never": "one_step strategy.every=0",
        "narrow": "one_step problem.num_inputs=8",
        "tiny": "fixed budget.samples=10",
    }
    named = ",".join(f"{{{name}: '{row}'}}" for name, row in rows.items())
    done = compare(
        folder,
        *("controls=[fixed]", f"strategies=[one_step,{named}]", "seeds=[0]", "warm_start=50"),
        *("match=samples", "budget.samples=640"),
    )
    assert done.returncode == 2, done.printed
    return folder, " ".join(done.printed.split()), {r.row: r for r in results.read(folder)}


def test_a_shared_warm_start_is_trained_once_and_begins_every_row(warm):
    folder, _, rows = warm
    log = (folder / "warm" / "seed0" / "metrics.jsonl").read_text().splitlines()
    probes = [record for record in map(json.loads, log) if record["kind"] == "probe"]
    assert [probe["step"] for probe in probes] == [0, 50]
    assert all(rows[name].step0 == probes[-1]["metrics"] for name in ("fixed", "one_step", "three"))
    assert probes[-1]["metrics"]["error"] < probes[0]["metrics"]["error"]


def test_rows_that_fail_are_reported_and_the_others_go_on(warm):
    _, _, rows = warm
    assert {name for name, row in rows.items() if row.error is None} == {
        *("fixed", "one_step", "three"),
    }
    assert {rows[name].steps for name in ("fixed", "one_step", "three")} == {10}


def test_the_error_of_a_row_that_cannot_be_built_is_stored_whole(warm):
    assert warm[2]["never"].error == (
        "strategy: every=0 must be at least 1 and burn_in=0.1 a number of steps, or a share of the "
        "budget below 1"
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("broken", ["num_batches=0"]),
        ("never", ["every=0 must be at least 1"]),
        ("narrow", ["warm start", "size mismatch"]),  # its learner is built otherwise
        ("tiny", ["budget.samples=10: no step fits, the first one took 64"]),
    ],
)
def test_a_row_that_fails_says_why_in_one_line(warm, row, words):
    folder, printed, rows = warm
    error = rows[row].error
    assert all(word in error for word in words), error
    assert "\n" not in error
    assert len(error) < 400
    assert f"{row} failed on seed 0" in printed
    assert all(word in printed for word in words), printed
    assert all(word in (folder / "table.md").read_text() for word in words)


BAD = {
    "unknown strategy": (["strategies=[one_stepp]"], ["one_stepp", "one_step", "greedy"]),
    "seeds twice": (["seeds=[0,1,0]"], ["seeds", "once"]),
    "no seed": (["seeds=[]"], ["seeds"]),
    "unknown unit": (["match=minutes"], ["match=minutes", "seconds"]),
    "no budget in that unit": (["match=seconds"], ["budget.seconds=N"]),
    "a row's budget in another unit": (
        ["strategies=[{a: 'fixed budget.seconds=5'}]"],
        ["a: budget.seconds=5", "set budget.steps"],
    ),
    "an option that no row has": (["strategy.num_candidate=3"], ["strategy.num_candidate=3"]),
    "one name for two rows": (
        ["strategies=[{a:fixed},{a:greedy}]"],
        ["strategies", "name a"],
    ),
    "no direction": (["metrics={error: up}"], ["metrics.error=up", "lower or higher"]),
    "no row": (["strategies=[]", "controls=[]"], ["strategies=[]"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, case):
    options, words = BAD[case]
    line = error_of(compare(tmp_path / "c", "seeds=[0]", *options))
    assert all(word in line for word in words), line
    assert not (tmp_path / "c").exists()


def test_rows_start_their_loading_processes_as_a_run_does(tmp_path):
    build = partial(telling, method=mp.get_start_method())
    warm = Job("warm", 0, tmp_path / "warm", build, untrained=True)
    (result,) = Comparison(
        tmp_path, [warm, Job("fixed", 0, tmp_path / "row", build, warm=warm.folder)]
    ).run()
    assert result.metrics == {"as asked": 1.0}, result.error
