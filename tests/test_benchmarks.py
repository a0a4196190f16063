"""Every benchmark runs on the smallest of its settings."""

import json
import math
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig

from metavpt.compare import command

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
language, steady = import_module("language"), import_module("steady")
gpu, rounds = import_module("gpu"), import_module("rounds")
TINY = {
    name: row
    for part in (language.PART, steady.PART)
    for name, row in part.rows.items()
    if name.startswith("tiny")
}


@pytest.mark.parametrize("name", TINY)
def test_a_row_runs(name: str):
    call = TINY[name].prepare()
    for _ in range(TINY[name].cycle):
        call()
    figures = call.figures() if hasattr(call, "figures") else {}
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
    assert figures.keys() == ({"lower_bound"} if isinstance(call, steady.Training) else set())


ABSENT = re.findall(r"^\| (.+?) \| not measured", rounds.DOCUMENT.read_text(), re.MULTILINE)
TITLES = {
    **{("language", name): size.title for name, size in language.SIZES.items()},
    **{("steady", name): setting.of.title for name, setting in steady.SETTINGS.items()},
}


def test_the_gpu_script_has_rows_for_all_that_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {TITLES[part, row.partition("/")[0]] for part, row in gpu.ROWS}
    assert asked >= set(ABSENT)
    assert all(row in gpu.PARTS[part].rows for part, row in gpu.ROWS)
    seconds = 25 * len(gpu.ROWS) + sum(one.seconds for one in gpu.COMPARISONS)
    assert seconds < 13 * 60
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu.py"])
        with pytest.raises(SystemExit, match="no GPU here; missing: language 135m/plain") as stop:
            gpu.main()
        assert "\n" not in str(stop.value)


@pytest.mark.parametrize("one", gpu.COMPARISONS, ids=lambda one: one.name)
def test_the_gpu_comparisons_compose(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [option.replace("{data}", "/path/to/data") for option in one.options]
    shared = [option for option in options if option.startswith("strategy.")]
    monkeypatch.setattr(command, "shared", shared)
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        own = [option for option in options if option not in shared]
        config = compose("compare", own, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        rows = command.compositions(config)
    assert len(config.seeds) == 5
    assert {"fixed", command.WARM_START} < set(rows)


def test_the_gpu_script_runs_tiny_on_a_cpu_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, runs = tmp_path / "gpu.jsonl", tmp_path / "runs"
    options = ["--toy", "--threads", "1", "--results", str(results), "--runs", str(runs)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options, "--minutes", "0.9"])
    gpu.main()  # a comparison would need a minute
    assert capsys.readouterr().out.endswith("missing: compare toy\n")
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    gpu.main()
    assert capsys.readouterr().out.endswith("nothing is missing\n")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["row"] for line in lines] == ["tiny_lm/plain", "toy"]
    assert lines[0]["run"]["seconds"] > 0
    assert "| one_step |" in (runs / "toy" / "table.md").read_text()


def test_rows_of_the_gpu_stand_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "gpu.jsonl"
    monkeypatch.setattr(rounds, "GPU_RESULTS", results)
    report = json.loads((ROOT / "benchmarks" / "results" / "steady.json").read_text())
    title = steady.SETTINGS["vit_s_64"].of.title
    assert f"| {title} | not measured" in "\n".join(steady.section(report))
    where = {"command": "gpu.py", "date": "today", "gpu": "NVIDIA H200", "torch": "2.14"}
    run = {"seconds": 0.1, "peak_mib": 1000.0, "lower_bound": 0.08, "flops": 1e13}
    for row, run_of_row in (
        ("vit_s_64/plain", run),
        ("vit_s_64/one_step_8", {**run, "seconds": 0.104}),
        ("vit_s_128/plain", {"error": "out of memory"}),
    ):
        gpu.append(results, {"part": "steady", "row": row, "environment": where, "run": run_of_row})
    text = "\n".join(steady.section(report))
    assert f"| {title} | not measured" not in text
    assert f"| {title}: plain | 640 images/s | 0.100 (0.100 .. 0.100) | 1.00 |" in text
    assert f"time of {title}: one_step, meta every 8 <= 1.053 x {title}: plain | 1.04 | met" in text
    assert f"| {steady.SETTINGS['vit_s_128'].of.title} | not measured" in text
    assert "NVIDIA H200, torch 2.14, today" in text
