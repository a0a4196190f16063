"""The README's problem: short, shown as it is, and run from a folder outside the repository."""

import json
from pathlib import Path

from helpers import command_process

ROOT = Path(__file__).parents[1]
SOURCE = (ROOT / "examples" / "channels.py").read_text()


def test_the_readme_shows_the_example_as_it_is_and_it_is_short():
    assert f"```python\n{SOURCE}```" in (ROOT / "README.md").read_text()
    assert sum(1 for line in SOURCE.splitlines() if line.strip()) <= 40


def test_it_runs_from_anywhere_and_steering_helps(tmp_path):
    (tmp_path / "channels.py").write_text(SOURCE)
    (tmp_path / "conf" / "problem").mkdir(parents=True)
    (tmp_path / "conf" / "problem" / "channels.yaml").write_text("_target_: channels.Channels\n")
    useful = {}
    for strategy in ("fixed", "one_step"):
        options = [
            "problem=channels",
            f"strategy={strategy}",
            "budget.steps=300",
            "trainer.optimizer.lr=1e-2",
            f"output={strategy}",
        ]
        if strategy == "one_step":
            options += ["strategy.optimizer.lr=0.05", "strategy.burn_in=0"]
        done = command_process.run(
            tmp_path, "--config-dir", "conf", *options, environment={"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / strategy / "report.html").stat().st_size > 1000
        records = [
            json.loads(line)
            for line in (tmp_path / strategy / "metrics.jsonl").read_text().splitlines()
        ]
        useful[strategy] = [
            record["metrics"]["useful_mse"] for record in records if record["kind"] == "probe"
        ]
    assert useful["fixed"][0] == useful["one_step"][0]
    assert useful["one_step"][-1] < 0.1 * useful["fixed"][-1]
