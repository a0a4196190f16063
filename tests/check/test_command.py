"""python -m metavpt.check, as a user runs it."""

import io
import os
import re

from helpers import command_process
from helpers.command_process import EXAMPLES, WITH_EXAMPLES
from omegaconf import OmegaConf

from metavpt.check.command import fewer_samples, progress
from metavpt.cli.console import Console

BROKEN = """
import torch
from channels import Channels

class Broken(Channels):
    def pretrain_loss(self, theta, task):
        return super().pretrain_loss(theta, task) * (1 + torch.rand(()))
"""


def run(*arguments, folder):
    places = os.pathsep.join([str(folder), str(EXAMPLES)])
    environment = {**WITH_EXAMPLES, "PYTHONPATH": places, "COLUMNS": "160"}
    return command_process.run(folder, *arguments, module="check", environment=environment)


def test_a_sound_problem_ends_with_its_verdict_and_status_0():
    done = run("--config-dir", "conf", "problem=channels", "threads=1", folder=EXAMPLES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("verdict: ok (")
    assert "exact_product" in done.stdout
    assert done.stderr == ""
    started = re.findall(r"^ *(\d+) s  (.+)$", done.stdout, flags=re.MULTILINE)
    names = [name for _, name in started]
    assert names[0] == "making the problem"
    assert len(set(names)) == len(names)
    assert set(names) >= {"purity", "reach", "exact_product", "learner_step", "first_order"}
    seconds = [int(second) for second, _ in started]
    assert seconds == sorted(seconds)
    assert done.stdout.index("first_order") < done.stdout.index("verdict")


def test_progress_is_shown_at_once_and_gives_way_on_a_terminal():
    plain = Console(file=io.StringIO())
    with progress(plain) as started:
        started("first")
        assert plain.file.getvalue() == "   0 s  first\n"
    file = io.StringIO()
    live = Console(file=file, force_terminal=True, width=60)
    with progress(live) as started:
        started("[/first]")
        started("second")
    shown = file.getvalue()
    assert "[/first]" in shown
    assert "second" in shown
    assert shown.count("\x1b[2K") >= 2  # both lines are erased in the end


def test_a_broken_problem_names_what_failed_and_ends_with_status_1(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "conf" / "problem").mkdir(parents=True)
    (tmp_path / "conf" / "problem" / "broken.yaml").write_text("_target_: broken.Broken\n")
    done = run("--config-dir", "conf", "problem=broken", folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("verdict: failed (1 failed")
    assert done.stdout.splitlines()[-1].endswith(": pretrain_purity")
    assert "another loss" in done.stdout
    assert list(tmp_path.glob("runs*")) == []


def test_large_batches_are_checked_with_fewer_samples():
    problem = OmegaConf.create({"feedback_batch_size": None, "meta_batch_size": 16})
    assert fewer_samples(problem) == "problem.feedback_batch_size=64, problem.meta_batch_size=4"
    assert problem == {"feedback_batch_size": 64, "meta_batch_size": 4}
    assert fewer_samples(problem) == ""
    assert fewer_samples(OmegaConf.create({"width": 3})) == ""


def test_a_wrong_name_is_one_line_and_status_2(tmp_path):
    done = run("problem=dino_nyu2", folder=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
