"""python -m metavpt.bench, as a user runs it."""

import json

from helpers import command_process


def test_a_breakdown_is_printed_and_stored(tmp_path):
    done = command_process.run(
        tmp_path,
        "--config-dir",
        str(command_process.EXAMPLES / "conf"),
        "problem=channels",
        "measure.steps=9",
        "strategy.every=4",
        "threads=1",
        module="bench",
        environment=command_process.WITH_EXAMPLES,
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
