"""python -m metavpt.bench, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments, folder):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "metavpt.bench", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_breakdown_is_printed_and_stored(tmp_path):
    conf = str(EXAMPLES / "conf")
    done = run(
        "--config-dir",
        conf,
        "problem=channels",
        "measure.steps=9",
        "strategy.every=4",
        "threads=1",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "measured / lower bound" in done.stdout
    assert "product" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    found = json.loads((folder / "step.json").read_text())
    assert len(found["steps"]) == 12  # whole periods
    assert found["lower_bound"]["passes"]["g_down"] == 0.25
    assert json.loads((folder / "environment.json").read_text())["command"].startswith(
        "python -m metavpt.bench --config-dir"
    )
