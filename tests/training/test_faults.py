"""Runs that are killed at random moments, and full disks: the rest can be resumed bit for bit.

pytest tests/training/test_faults.py --kills 50 -s      the long version, with a line of what was
hit
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest
import torch
from helpers import command_process

from metavpt.report import read_log
from metavpt.training.checkpoint import Checkpoints

OPTIONS = [
    "problem=toy_sources", "strategy=one_step", "strategy.burn_in=0", "strategy.every=2",
    "budget.steps=150", "threads=1",
    "trainer.checkpoint_every=2", "trainer.log_every=5", "trainer.probe_every=40",
    "trainer.first_order_every=10", "output=run",
]  # fmt: skip
CLOCK = {"seconds", "samples_per_s"}
STATUS = {  # where the command was listening already, and where it was still starting
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {0, -signal.SIGTERM},
    signal.SIGINT: {130, 1},
    signal.SIGHUP: {0, -signal.SIGHUP},
}


def finish(folder, *options, **limits):
    return command_process.finish(folder, *OPTIONS, *options, **limits)


def outcome(run):
    """All that a run comes to, without what depends on the clock."""
    state = Checkpoints(run / "checkpoints").newest().state
    del state["budget"]["times"], state["budget"]["peak_memory"], state["log"], state["digest"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return state, [
        {name: value for name, value in record.items() if name not in CLOCK} for record in records
    ]


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)


def assert_loadable(run):
    checkpoints = Checkpoints(run / "checkpoints")
    if checkpoints.paths():
        assert checkpoints.newest().unreadable == []
    if (run / "metrics.jsonl").is_file():
        assert not [
            record for record in read_log(run / "metrics.jsonl") if record["kind"] == "warning"
        ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder, "budget.steps=1", "output=first")  # which starts what the others are forked from
    began = time.monotonic()
    status, output = finish(folder)
    assert status == 0, output
    return outcome(folder / "run"), time.monotonic() - began


class Victim:
    """A run that is killed and resumed repeatedly, then compared with the uninterrupted one."""

    def __init__(self, folder, expected):
        self.folder, self.run, self.expected = folder, folder / "run", expected
        self.hit = Counter()

    def start(self, **limits):
        if not (self.run / "config.yaml").is_file() or not (self.run / "config.yaml").read_text():
            shutil.rmtree(self.run, ignore_errors=True)  # killed before there was a run
        resume = ["resume=true"] if self.run.exists() else []
        return command_process.start(self.folder, *OPTIONS, *resume, **limits)

    def kill(self, number, delay=None):
        """Send the signal after `delay` seconds; None: while a checkpoint is being written."""
        process = self.start()
        if delay is None:
            while process.is_alive() and not list(self.run.glob("checkpoints/*.partial")):
                pass
        else:
            process.join(delay)
        if process.is_alive():
            os.kill(process.pid, number)
            process.join(60)
            assert process.exitcode in STATUS[number] | {0}, self.output
            self.note(number, process.exitcode)
        assert_loadable(self.run)
        if process.exitcode == 0 and "stopped by" not in self.output:
            self.check_finished()

    def stop_midway(self, number):
        """The exit status after a signal that came when there were two checkpoints."""
        process, checkpoints = self.start(), Checkpoints(self.run / "checkpoints")
        while process.is_alive() and len(checkpoints.paths()) < 2:
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.join(60)
        return process.exitcode

    def note(self, number, status):
        torn = list(self.run.glob("checkpoints/*.partial"))
        self.hit[signal.Signals(number).name] += 1
        self.hit["in a checkpoint's write"] += bool(torn)
        if "stopped by SIGTERM, saved" in self.output:
            assert status == 0
            assert "resume=true" in self.output
            assert "output=run" in self.output
            self.hit["saved by SIGTERM"] += 1

    def check_finished(self):
        assert_same(self.expected, outcome(self.run))
        self.hit["finished and compared"] += 1
        shutil.rmtree(self.run)

    @property
    def output(self):
        return (self.folder / "output.txt").read_text()


def test_killed_at_random_moments_a_run_goes_on_bit_for_bit(tmp_path, whole, request):
    expected, duration = whole
    rng, victim = random.Random(0), Victim(tmp_path, expected)
    kills = request.config.getoption("--kills")
    while (done := sum(victim.hit[number.name] for number in STATUS)) < kills:
        if done % 3 == 0:
            victim.kill(signal.SIGKILL)
        else:
            victim.kill(rng.choice(list(STATUS)), rng.uniform(0, 1.1 * duration))
    while not victim.hit["finished and compared"] or victim.run.exists():
        victim.kill(signal.SIGKILL, 60)
    assert victim.hit["in a checkpoint's write"]
    print(f"\n{dict(victim.hit)}")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)]
)
def test_asked_to_stop_a_run_saves_its_last_step_and_says_how_it_goes_on(
    tmp_path, whole, number, status
):
    victim = Victim(tmp_path, whole[0])
    assert victim.stop_midway(number) == status
    newest = Checkpoints(victim.run / "checkpoints").newest()
    said, command = victim.output.splitlines()[-2:]
    assert f"stopped by {number.name}, saved in run/checkpoints/{newest.path.name}" in said
    assert command.startswith("python -m metavpt.run problem=toy_sources")
    assert command.endswith("output=run resume=true")
    assert finish(tmp_path, "resume=true")[0] == 0
    victim.check_finished()


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tmp_path, whole):
    victim = Victim(tmp_path, whole[0])
    victim.stop_midway(signal.SIGTERM)
    older, newest = Checkpoints(victim.run / "checkpoints").paths()
    newest.write_bytes(newest.read_bytes()[:-2000])
    status, output = finish(tmp_path, "resume=true")
    assert status == 0, output
    log = victim.run / "metrics.jsonl"
    warnings = [record["message"] for record in read_log(log) if record["kind"] == "warning"]
    assert len(warnings) == 1
    assert f"{newest.name}: not a readable checkpoint" in warnings[0]
    assert f"{older.name}" in warnings[0]
    log.write_text(
        "".join(
            line for line in log.read_text().splitlines(keepends=True) if '"warning"' not in line
        )
    )
    victim.check_finished()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_a_disk_that_fills_leaves_what_was_saved_and_one_clear_line(tmp_path, whole, share):
    """The disk fills at this share of a checkpoint: in the log, near the start, amid, at end."""
    if "COVERAGE_PROCESS_CONFIG" in os.environ:
        pytest.skip("what make coverage writes would not fit on that disk either")
    victim = Victim(tmp_path, whole[0])
    victim.stop_midway(signal.SIGTERM)
    checkpoints = Checkpoints(victim.run / "checkpoints")
    before = checkpoints.paths()
    status, output = finish(
        tmp_path, "resume=true", file_limit=int(share * before[-1].stat().st_size)
    )
    assert status == 2
    (line,) = [line for line in output.splitlines() if "error" in line]
    assert "cannot be written (File too large)" in line
    assert "resume=true" in line
    assert checkpoints.paths() == before
    assert_loadable(victim.run)
    status, output = finish(tmp_path, "resume=true")
    assert status == 0, output
    victim.check_finished()


def test_a_second_process_in_the_folder_of_a_run_gets_one_line(tmp_path, whole):
    victim = Victim(tmp_path, whole[0])
    process = victim.start()
    while process.is_alive() and not Checkpoints(victim.run / "checkpoints").paths():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "run").symlink_to(victim.run)
        status, output = finish(tmp_path / "other", "resume=true")
        assert status == 2
        (line,) = output.strip().splitlines()
        assert f"process {process.pid} on" in line
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 0, victim.output
    victim.check_finished()


def test_a_report_that_the_disk_has_no_room_for_is_one_line(tmp_path, whole):
    status, output = finish(tmp_path)
    assert status == 0, output
    report = tmp_path / "run" / "report.html"
    before = report.read_bytes()
    status, output = finish(tmp_path, "resume=true", file_limit=len(before) // 2)
    assert status == 2
    line = output.strip().splitlines()[-1]
    assert "report.html: cannot be written (File too large)" in line
    assert report.read_bytes() == before


def test_an_early_failure_in_a_linked_folder_is_named(tmp_path, whole):
    (tmp_path / "target").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "target")
    status, output = finish(tmp_path, "minimise=no/such_metric")
    assert status == 2, output
    assert "minimise=no/such_metric: no such metric" in output.strip().splitlines()[-1]
    assert (tmp_path / "run").is_symlink()
    assert list((tmp_path / "target").iterdir()) == []
