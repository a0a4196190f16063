"""One table of runs and comparisons of several learners."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from metavpt.compare import results
from metavpt.compare.results import Result
from metavpt.errors import MetaVPTError
from metavpt.report import command
from metavpt.report.table import read_outcomes, table

DIRECTIONS = {"linear_bn/depth_rmse": "lower", "gsm8k/pass@1_strict": "higher"}


def run(
    folder: Path, config: str, strategy: str, seed: int, probes: dict[int, dict[str, float]]
) -> Path:
    folder.mkdir()
    records: list[dict[str, Any]] = [
        {"kind": "probe", "step": step, "metrics": metrics, "directions": DIRECTIONS}
        for step, metrics in probes.items()
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "config.yaml").write_text(config)
    (folder / "environment.json").write_text(json.dumps({"strategy": strategy, "seed": seed}))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    vit, lm = "backbone: {name: vit_base}", "learner: {source: Qwen/Qwen2.5-0.5B, lora: {rank: 8}}"
    rmse, passed = DIRECTIONS
    made = [
        run(tmp_path / f"fixed{seed}", vit, "fixed", seed, {0: {rmse: 0.6}, 9: {rmse: end}})
        for seed, end in enumerate((0.5, 0.7))
    ]
    made.append(run(tmp_path / "v0", vit, "v_pretraining", 0, {0: {rmse: 0.6}, 9: {rmse: 0.4}}))
    comparison = tmp_path / "lm"
    comparison.mkdir()
    (comparison / "config.yaml").write_text(lm)
    for row, end in (("fixed", 0.20), ("one_step_linear", 0.25)):
        result = Result(row, 3, step0={passed: 0.1}, metrics={passed: end}, directions=DIRECTIONS)
        results.append(comparison, result)
    results.append(comparison, Result("greedy", 3, error="NonFiniteError: not finite"))
    return [*made, comparison]


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_table_has_a_line_for_each_learner_and_row_and_a_part_for_each_set_of_metrics(
    folders: list[Path],
) -> None:
    assert cells(table(folders)) == [
        ["learner", "row", "seeds", "linear_bn/depth_rmse ↓"],
        ["vit_base", "step 0", "2", "0.6 ± 0"],
        ["vit_base", "fixed", "2", "0.60 ± 0.10"],
        ["vit_base", "v_pretraining", "1", "0.4"],
        ["learner", "row", "seeds", "gsm8k/pass@1_strict ↑"],
        ["Qwen2.5-0.5B, LoRA", "step 0", "1", "0.1"],
        ["Qwen2.5-0.5B, LoRA", "fixed", "1", "0.2"],
        ["Qwen2.5-0.5B, LoRA", "one_step_linear", "1", "0.25"],
    ]


def test_table_shows_the_metrics_that_are_asked_for(folders: list[Path]) -> None:
    shown = cells(table(folders, ["linear_bn/depth_rmse"]))
    assert {line[0] for line in shown} == {"learner", "vit_base"}
    with pytest.raises(MetaVPTError, match="known: linear_bn/depth_rmse"):
        table(folders, ["none"])


def test_table_refuses_one_run_twice_and_one_that_has_not_ended(
    folders: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(MetaVPTError, match="seed 0; leave one out"):
        table([*folders, folders[0]])
    begun = run(tmp_path / "begun", "", "fixed", 0, {0: {"nll": 1.0}})
    with pytest.raises(MetaVPTError, match="has not ended"):
        read_outcomes(begun)


def test_main_prints_the_table(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--table", *map(str, folders), "--metrics", "gsm8k/pass@1_strict"]
    monkeypatch.setattr(sys, "argv", ["metavpt.report", *arguments])
    command.main()
    assert "| Qwen2.5-0.5B, LoRA | one_step_linear | 1 | 0.25 |" in capsys.readouterr().out
    assert not [folder for folder in folders if (folder / "report.html").exists()]
