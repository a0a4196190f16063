"""Sweeps from the command line: one run per job, a table, and the best configuration again."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import command_process
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import MissingConfigException

from metavpt.cli.one_line_errors import reporting
from metavpt.run.sweep import Job, experiment

ROOT = Path(__file__).parents[2]
PROBLEM = ["problem=channels", "strategy.burn_in=0", "budget.steps=12", "trainer.log_every=5"]


def run(folder, *options):
    conf = str(command_process.EXAMPLES / "conf")
    return command_process.run(
        folder,
        *("--config-dir", conf, *options),
        environment=command_process.WITH_EXAMPLES,
        seconds=240,
    )


def run_apart(folder, *options):
    """As `run`, by a start of Python, at whose end joblib's workers end too."""
    conf = str(command_process.EXAMPLES / "conf")
    return subprocess.run(
        [sys.executable, "-m", "metavpt.run", "--config-dir", conf, *options],
        cwd=folder,
        env={**os.environ, **command_process.WITH_EXAMPLES},
        capture_output=True,
        text=True,
        timeout=240,
    )


def sweep(folder, *options, by=run):
    """Folder and table (a list of rows) of a sweep that ends well."""
    done = by(folder, "-m", *PROBLEM, *options)
    assert done.returncode == 0, done.stderr
    (made,) = (folder / "runs").glob("sweep-*")
    with (made / "table.csv").open() as file:
        return made, list(csv.DictReader(file))


def probes(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "probe"]


def end(folder):
    """The metrics that a run ends with."""
    return probes(folder)[-1]["metrics"]


def test_three_jobs_make_a_sorted_table_the_best_of_them_is_run_again_and_the_sweep_goes_on(
    tmp_path,
):
    made, rows = sweep(tmp_path, "trainer.optimizer.lr=1e-3,1e-2,1e38", "minimise=useful_mse")
    assert [(row["job"], row["trainer.optimizer.lr"]) for row in rows] == [
        ("1", "0.01"),
        ("0", "0.001"),
        ("2", "1e+38"),
    ]
    ends = [end(made / row["job"])["useful_mse"] for row in rows[:2]]
    assert (
        [float(row["objective"]) for row in rows[:2]]
        == [float(row["useful_mse"]) for row in rows[:2]]
        == ends
        == sorted(ends)
    )
    assert (rows[2]["objective"], rows[2]["useful_mse"]) == ("failed", "")  # the others went on
    assert len((made / "table.md").read_text().splitlines()) == 2 + 3
    assert not [path.name for path in tmp_path.iterdir() if path.name != "runs"]
    best = yaml.safe_load((made / "experiment" / "best.yaml").read_text())
    assert best["defaults"] == ["_self_", {"override /problem": "channels"}]
    assert best["trainer"] == {"log_every": 5, "optimizer": {"lr": 0.01}}
    again = run(tmp_path, f"hydra.searchpath=[file://{made}]", "experiment=best", "output=again")
    assert again.returncode == 0, again.stderr
    assert end(tmp_path / "again") == end(made / "1")
    assert (tmp_path / "again" / "config.yaml").read_text() == (
        made / "1" / "config.yaml"
    ).read_text()
    options = [
        "trainer.optimizer.lr=1e-3,1e-2,1e38,1e-4",
        "minimise=useful_mse",
        f"hydra.sweep.dir={made}",
        "resume=true",
    ]
    _, longer = sweep(tmp_path, *options)  # a sweep that was cut short goes on
    assert [row["job"] for row in longer] == ["1", "0", "3", "2"]
    assert longer[:2] == rows[:2]
    assert [probe["step"] for probe in probes(made / "1")] == [
        0,
        12,
    ]  # neither trained nor measured again


def test_optuna_minimises_the_objective_over_a_log_range_two_jobs_at_a_time(tmp_path):
    pytest.importorskip("optuna", minversion="4")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    options = [
        "hydra/sweeper=metavpt_optuna",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.n_jobs=2",
        "hydra/launcher=local",
        "threads=1",
    ]
    made, rows = sweep(
        tmp_path,
        *options,
        "trainer.optimizer.lr=tag(log,interval(1e-4,1e-1))",
        "minimise=useful_mse",
        by=run_apart,
    )
    assert sorted(row["job"] for row in rows) == ["0", "1", "2"]
    values = [float(row["objective"]) for row in rows]
    assert values == sorted(values)
    assert values == [end(made / row["job"])["useful_mse"] for row in rows]
    assert {
        json.loads((made / row["job"] / "environment.json").read_text())["threads"] for row in rows
    } == {1}
    found = yaml.safe_load((made / "optimization_results.yaml").read_text())
    best = yaml.safe_load((made / "experiment" / "best.yaml").read_text())
    assert found["best_value"] == values[0]
    assert (
        found["best_params"]["trainer.optimizer.lr"]
        == best["trainer"]["optimizer"]["lr"]
        == float(rows[0]["trainer.optimizer.lr"])
    )


def test_ranges_of_the_command_line_become_those_of_optuna():
    optuna = pytest.importorskip("optuna", minversion="4")
    from hydra_plugins.metavpt_optuna_sweeper import search_space

    space, fixed = search_space(
        [
            *("a=interval(0.1,1)", "b=tag(log,int(interval(1,64)))", "c=x,y", "d=range(2,9,3)"),
            *("e=1,2", "e=[1,2]", "strategy=fixed"),  # of two with one key the last one counts
        ]
    )
    kinds = optuna.distributions
    assert space == {
        "a": kinds.FloatDistribution(0.1, 1.0),
        "b": kinds.IntDistribution(1, 64, log=True),
        "c": kinds.CategoricalDistribution(["x", "y"]),
        "d": kinds.IntDistribution(2, 8, step=3),
    }
    assert fixed == ["e=[1,2]", "strategy=fixed"]


def test_an_unknown_objective_is_one_line_before_any_training(tmp_path):
    done = run(tmp_path, "-m", *PROBLEM, "seed=0,1", "minimise=useful")
    assert done.returncode == 2
    assert done.stderr == "error minimise=useful: no such metric; known: useful_mse\n"
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_the_best_configuration_says_what_a_file_can_say():
    overrides = [
        "problem=dino_masks", "experiment=paper_nyuv2_vitb", "+extra/group=one",
        "data.unlabelled=[frames,/a b]", "++new.key=null",
        "backbone.name='a: b'", "~designer.blur_sigma", "runs=elsewhere", "minimise=x",
    ]  # fmt: skip
    text = experiment(Job(4, overrides, ["problem", "experiment", "extra/group"], 0.5))
    assert text.startswith("# @package _global_\n")
    assert "\n# and ~designer.blur_sigma on the command line" in text
    assert yaml.safe_load(text) == {
        "defaults": [
            "paper_nyuv2_vitb",
            {"/extra/group": "one"},
            "_self_",
            {"override /problem": "dino_masks"},
        ],
        "data": {"unlabelled": ["frames", "/a b"]},
        "new": {"key": None},
        "backbone": {"name": "a: b"},
    }


# V-Pretraining, table of hyper-parameters: ADE20K ViT-B, ADE20K ViT-L, NYUv2 ViT-B, NYUv2 ViT-L.
PAPER = {
    "trainer.optimizer.lr": (4.15e-6, 4.50e-5, 8.58e-6, 1.94e-6),
    "strategy.optimizer.lr": (1.54e-4, 2.17e-4, 2.21e-4, 8.03e-4),
    "strategy.every": (4, 4, 8, 2),
    "backbone.tail_blocks": (2, 4, 3, 4),
    "designer.keep": (0.6, 0.5, 0.4, 0.4),
    "designer.sparsity_weight": (0.131, 0.196, 0.111, 0.401),
    "designer.tv_weight": (0.144, 0.0399, 0.0417, 0.159),
    "feedback.segmentation_weight": (1, 4, 16, 32),
    "feedback.depth_weight": (8, 1, 2, 16),
}


def test_the_ranges_of_the_paper_sweep_hold_the_papers_rows():
    params = yaml.safe_load((ROOT / "configs" / "hydra" / "sweeper" / "paper.yaml").read_text())[
        "params"
    ]
    assert params.keys() - {"minimise"} == PAPER.keys()
    for key, values in PAPER.items():
        (override,) = OverridesParser.create().parse_overrides([f"{key}={params[key]}"])
        swept = override.value()
        if isinstance(swept, IntervalSweep):
            assert swept.start <= min(values) <= max(values) <= swept.end  # type: ignore[operator]
            assert math.isclose(swept.start, swept.end, rel_tol=0.6) or "log" in swept.tags
        else:
            assert set(values) <= set(override.sweep_iterator())


@pytest.mark.parametrize(
    "what", ["find", "load"]
)  # named on the command line, or by a configuration of ours
def test_a_plugin_that_is_not_installed_names_its_extra(capsys, what):
    with pytest.raises(SystemExit) as left, reporting():
        raise MissingConfigException(
            f"In 'hydra/launcher/local': Could not {what} 'hydra/launcher/joblib'."
        )
    assert left.value.code == 2
    assert "pip install 'metavpt[joblib]'" in capsys.readouterr().err
