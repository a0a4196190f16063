"""The page of a run: all logged values in one file, which no input breaks."""

import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.html_page import HOSTILE, Page, assert_self_contained
from PIL import Image
from rich.console import Console

from metavpt import report
from metavpt.errors import MetaVPTError
from metavpt.report.run import class_tables, health, lead, steering
from metavpt.run import command

DIRECTIONS = {
    "ridge/depth_rmse": "lower",
    "ridge/seg_miou": "higher",
    "ridge/depth_delta1": "higher",
}


def records() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for step in range(0, 41, 10):
        metrics = {
            "ridge/depth_rmse": 0.6 - step / 1000,
            "ridge/seg_miou": 0.3 - step / 1000,
            "ridge/depth_delta1": 0.8,
            "odd": 1.0 + step,
        }
        made.append({"kind": "probe", "step": step, "metrics": metrics, "directions": DIRECTIONS})
        seconds = {"learner": 3.0 * step, "designer": 1.0 * step, "data": 0.5}
        made.append(
            {
                "kind": "train",
                "step": step,
                "loss": 9 - step / 10,
                "lr": 1e-5,
                "samples": 8 * step,
                "seconds": float(step),
            }
        )
        made.append({"kind": "time", "step": step, "seconds": seconds})
        for shift in (0, 1, 2):
            made.append(
                {
                    "kind": "first_order",
                    "step": step,
                    "realised": 2e-4 * shift,
                    "predicted": 1e-4 * shift,
                    "predicted_plain": 0,
                }
            )
        made.append(
            {
                "kind": "designer",
                "step": step,
                "value": 1e-3 * step,
                "grad_norm": 1.0,
                "keep": 0.5,
                "residual": 1e-9,
            }
        )
    made.append({"kind": "warning", "step": 10, "message": f"odd {HOSTILE}"})
    made.append({"kind": "never heard of", "step": 10, "x": [1, 2]})
    return made


def write_run(folder: Path, log: list[dict[str, Any]]) -> Path:
    (folder / "figures").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    config = "problem:\n  _target_: mine.Rooms\nstrategy: one_step\nbudget:\n  steps: 40\n"
    (folder / "config.yaml").write_text(config + f"note: '{HOSTILE}'\n")
    (folder / "environment.json").write_text(
        json.dumps({"torch": "2.14.0", "gpu": None, "command": HOSTILE})
    )
    return folder


def save_figure(folder: Path, name: str, width: int = 6) -> None:
    Image.fromarray(np.zeros((4, width, 3), np.uint8)).save(folder / "figures" / f"{name}.png")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", records())


def test_the_page_holds_all_that_was_logged(run: Path) -> None:
    save_figure(run, "masks-step000000")
    save_figure(run, "masks-step000040", width=20)
    path = report.write_report(run)
    assert path == run / "report.html"
    page = Page(path.read_text())
    for name in (
        "ridge/depth_rmse",
        "ridge/seg_miou",
        "ridge/depth_delta1",
        "odd",
        "value",
        "grad_norm",
        "keep",
        "loss",
        "lr",
    ):
        assert name in page.text
    for text in (
        "Rooms · one_step",
        "Finished",
        "40 steps, 320 samples",
        "0.56",
        "learner 2 min 00 s",
        "designer 40.0 s",
        "2.14.0",
        "step 40",
    ):
        assert text in page.text
    assert page.tags.count("svg") == 4 + 4 + 2 + 2
    assert re.search(
        r"the learner's optimizer\s*r = 1\.00.*?slope 2\.00\s*15 steps", page.text, re.DOTALL
    )
    assert page.tags.count("img") == 2
    assert [value for name, value in page.attributes if name == "alt"] == [
        "masks at step 0",
        "masks at step 40",
    ]
    assert not list(run.glob("*.partial"))


def test_the_page_needs_no_network_and_runs_nothing(run: Path) -> None:
    save_figure(run, "masks-step000000")
    assert_self_contained(report.write_report(run).read_text())


def test_hostile_strings_stay_text(run: Path) -> None:
    log = records()
    log.append({"kind": "probe", "step": 40, "metrics": {f"a{HOSTILE}": 1.0}})
    log.append({"kind": "designer", "step": 40, f"b{HOSTILE}": 1.0})
    log.append({"kind": "time", "step": 40, "seconds": {f"c{HOSTILE}": 1.0}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    save_figure(run, 'd"><i onload=x>-step000000')
    page = Page(report.write_report(run).read_text())
    assert "script" not in page.tags
    assert "onload" not in {name for name, _ in page.attributes}
    for mark in ("a", "b", "c", "odd "):
        assert mark + HOSTILE in page.text
    Console(file=io.StringIO()).print(command.summary(run))


def test_the_page_is_the_same_every_time(run: Path) -> None:
    first = report.write_report(run).read_text()
    assert report.write_report(run).read_text() == first


def test_a_folder_whose_name_is_not_utf8_has_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / os.fsdecode(b"a\xff"), records())
    assert "a?" in report.write_report(folder).read_text(encoding="utf-8")


def test_an_empty_folder_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(MetaVPTError, match="no such log"):
        report.write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(MetaVPTError, match="nothing has been logged"):
        report.write_report(tmp_path)


def test_a_log_alone_is_enough(tmp_path: Path) -> None:
    log = [
        {"kind": "probe", "step": 0, "metrics": {"acc": math.nan}},
        {"kind": "train", "step": 1, "loss": math.inf, "ok": True, "t": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    page = Page(report.write_report(tmp_path).read_text())
    assert tmp_path.name in page.text
    assert "Step 1." in page.text
    (tmp_path / "config.yaml").write_text("problem: [unclosed")
    (tmp_path / "environment.json").write_text("[1]")
    Page(report.write_report(tmp_path).read_text())


def test_the_status_tells_how_far_the_run_has_come(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", [record for record in records() if record.get("step", 0) <= 10]
    )
    assert "Step 10, 25% of the budget" in Page(report.write_report(run).read_text()).text


def test_summary_compares_first_and_last_step() -> None:
    rows = {row.name: row for row in report.summary_rows(records())}
    rmse, miou = rows["ridge/depth_rmse"], rows["ridge/seg_miou"]
    assert (rmse.first_step, rmse.last_step, rmse.first, rmse.last) == (
        0,
        40,
        0.6,
        pytest.approx(0.56),
    )
    assert rmse.change == pytest.approx(-0.04)
    assert rmse.percent == pytest.approx(-100 / 15)
    assert rmse.better is True
    assert miou.better is False
    assert rows["ridge/depth_delta1"].better is None  # unchanged
    assert rows["odd"].better is None  # nobody knows which way is good


@pytest.mark.parametrize(("sign", "better"), [(-1, False), (1, True), (0, None)])
def test_summary_row_is_better_in_the_stated_direction(sign: int, better: bool | None) -> None:
    assert report.SummaryRow("loss", 0, 1.0, 9, 2.0, sign).better is better
    assert report.SummaryRow("loss", 0, 1.0, 9, math.nan, sign).better is None
    assert report.SummaryRow("loss", 0, 1.0, 0, None, sign).better is None


@pytest.mark.parametrize("stated", [None, [1], "lower", {"odd": "up"}, {"odd": ["lower"]}])
def test_summary_survives_directions_that_are_none(stated: object) -> None:
    log = [
        {"kind": "probe", "step": step, "metrics": {"odd": 1.0 + step}, "directions": stated}
        for step in range(2)
    ]
    (row,) = report.summary_rows(log)
    assert row.better is None


def test_a_step_logged_twice_counts_once() -> None:
    log = [
        {"kind": "probe", "step": step, "metrics": {"acc": value}}
        for step, value in ((0, 0.1), (5, 0.2), (5, 0.3), (2, 0.9))
    ]
    (row,) = report.summary_rows(log)
    assert (row.first, row.last_step, row.last) == (0.1, 5, 0.3)


def test_the_lead_states_what_happened_to_the_target_and_claims_no_gain(run: Path) -> None:
    (run / "environment.json").write_text(
        json.dumps({"problem": "rooms", "strategy": "one_step", "seed": 3})
    )
    page = Page(report.write_report(run).read_text())
    assert "rooms · one_step" in page.text  # as typed, not the class that it stands for
    assert "ridge/depth_rmse went from 0.6 at step 0 to 0.56 after 40 steps (better)" in page.text
    assert "strategy one_step, seed 3. One run cannot tell a gain from noise" in page.text
    marked = [value for name, value in page.attributes if name == "class"]
    assert not {"better", "worse"} & {part for value in marked for part in (value or "").split()}


def test_the_lead_takes_a_target_metric_and_survives_a_log_without_an_end() -> None:
    log = [
        {"kind": "probe", "step": step, "metrics": {"aside": 1.0, "loss": 2.0 + step},
         "directions": {"aside": "lower", "loss": "lower"}, "targets": ["loss"]}
        for step in (0, 5)
    ]  # fmt: skip
    assert lead(log, "fixed", 0).startswith("loss went from 2 at step 0 to 7 after 5 steps (worse)")
    assert lead(log[:1], "fixed", 0) == "Nothing has been measured after step 0 yet."
    assert lead([], "", None) == "Nothing has been measured after step 0 yet."


def test_steering_counts_the_steps_of_the_last_record() -> None:
    train = {"kind": "train", "step": 40, "steered_steps": 36}
    assert steering([{**train, "step": 10, "steered_steps": 6}, train]) == [
        "36 of 40 steps were steered"
    ]
    labelled = {"kind": "train", "step": 40, "labelled_steps": 40}
    assert steering([labelled]) == ["labels trained the learner itself on 40 steps"]
    assert steering([{"kind": "train", "step": 40}]) == steering([]) == []


def test_health_is_judged_by_the_logged_range() -> None:
    watch = {"kind": "watch", "rank": 9.0, "hidden": 0.99, "entropy": 0.5}
    bounds = {"rank": [3.0, None], "hidden": [None, 0.95], "entropy": [None, None]}
    log = [
        {**watch, "step": 0, "bounds": bounds},
        {**watch, "step": 8, "rank": 2.0, "bounds": bounds},
    ]
    rows = {row.name: row for row in health(log)}
    assert (rows["rank"].first, rows["rank"].last, rows["rank"].verdict) == (9.0, 2.0, False)
    assert (rows["rank"].healthy, rows["hidden"].healthy) == ("at least 3", "at most 0.95")
    assert (rows["hidden"].verdict, rows["entropy"].verdict) == (False, None)
    assert {row.name: row.verdict for row in health(log[:1])}["rank"] is True
    assert health([{**watch, "step": 0}]) == health([]) == []  # a log from before the ranges


def test_class_tables_hold_the_first_and_the_last_value_of_each_class(run: Path) -> None:
    record = {"kind": "classes", "metric": "ridge/seg_iou"}
    log = records()
    log.append({**record, "step": 0, "values": [["wall", 0.5], ["cat", None], [HOSTILE, 0.25]]})
    log.append({**record, "step": 40, "values": [["wall", 0.75], ["cat", None], [HOSTILE, 0.5]]})
    log.append({**record, "step": 40, "metric": "broken", "values": [["wall"], 3, None]})
    tables = {table.metric: table for table in class_tables(log)}
    assert tables["ridge/seg_iou"].steps == (0, 40)
    assert tables["ridge/seg_iou"].rows == [
        ("wall", 0.5, 0.75), ("cat", None, None), (HOSTILE, 0.25, 0.5)
    ]  # fmt: skip
    assert tables["broken"].rows == []
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in log))
    page = Page(report.write_report(run).read_text())
    assert "ridge/seg_iou by class" in page.text
    assert HOSTILE in page.text
    assert "script" not in page.tags
