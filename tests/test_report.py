"""The report of a run: everything that was logged, in one file that needs nothing else and breaks on nothing."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from metavpt import report, summary
from metavpt.curves import curve
from metavpt.errors import MetaVPTError

HOSTILE = '<script>alert("x")</script>'
VOID = {"meta", "img", "br", "link", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Text, tags and attributes; fails on a tag that closes another one than the innermost."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.attributes, self.open, self.tags = "", [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def records() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for step in range(0, 41, 10):
        metrics = {
            "ridge/depth_rmse": 0.6 - step / 1000,
            "ridge/seg_miou": 0.3 - step / 1000,
            "ridge/depth_delta1": 0.8,
            "odd": 1.0 + step,
        }
        made.append({"kind": "probe", "step": step, "metrics": metrics})
        seconds = {"learner": 3.0 * step, "designer": 1.0 * step, "data": 0.5}
        made.append({"kind": "train", "step": step, "loss": 9 - step / 10, "lr": 1e-5, "samples": 8 * step, "seconds": float(step)})
        made.append({"kind": "time", "step": step, "seconds": seconds})
        made.append({"kind": "designer", "step": step, "value": 1e-3 * step, "grad_norm": 1.0, "keep": 0.5, "residual": 1e-9})
    made.append({"kind": "warning", "step": 10, "message": f"odd {HOSTILE}"})
    made.append({"kind": "never heard of", "step": 10, "x": [1, 2]})
    return made


def write_run(folder: Path, log: list[dict[str, Any]]) -> Path:
    (folder / "figures").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    config = "problem:\n  _target_: mine.Rooms\nstrategy: one_step\nbudget:\n  steps: 40\n"
    (folder / "config.yaml").write_text(config + f"note: '{HOSTILE}'\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.14.0", "gpu": None, "command": HOSTILE}))
    return folder


def save_figure(folder: Path, name: str, pixels: np.ndarray | None = None) -> bytes:
    path = folder / "figures" / f"{name}.png"
    Image.fromarray(np.zeros((4, 6, 3), np.uint8) if pixels is None else pixels).save(path)
    return path.read_bytes()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", records())


def test_the_page_holds_all_that_was_logged(run: Path) -> None:
    first, last = save_figure(run, "masks-step000000"), save_figure(run, "masks-step000040", np.full((4, 20, 3), 9, np.uint8))
    path = report.write_report(run)
    assert path == run / "report.html"
    html = path.read_text()
    page = Page(html)
    for name in ("ridge/depth_rmse", "ridge/seg_miou", "ridge/depth_delta1", "odd", "value", "grad_norm", "keep", "loss", "lr"):
        assert name in page.text
    for text in ("Rooms · one_step", "Finished", "40 steps, 320 samples", "0.56", "learner 2 min", "designer 40.0 s", "2.14.0", "step 40"):
        assert text in page.text
    assert page.tags.count("svg") == 4 + 4 + 2
    for image in (first, last):
        assert base64.b64encode(image).decode() in html
    assert not list(run.glob("*.tmp"))


def test_the_page_needs_no_network_and_runs_nothing(run: Path) -> None:
    save_figure(run, "masks-step000000")
    html = report.write_report(run).read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value is not None
            assert value.startswith(("data:image/png;base64,", "#"))


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
    Console(file=io.StringIO()).print(summary.table(run))


def test_ids_are_unique_and_every_reference_is_met(run: Path) -> None:
    page = Page(report.write_report(run).read_text())
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = {value[1:] for name, value in page.attributes if name.endswith("href") and value}
    references |= {match for _, value in page.attributes for match in re.findall(r"url\(#([^)]+)\)", value or "")}
    assert references
    assert references <= set(ids)


def test_the_page_is_the_same_every_time(run: Path) -> None:
    first = report.write_report(run).read_text()
    assert report.write_report(run).read_text() == first


def test_a_cut_last_line_is_skipped_and_a_bad_one_is_told(run: Path) -> None:
    path = run / "metrics.jsonl"
    whole = report.read_log(path)
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert report.read_log(path) == whole
    path.write_text("nonsense\n" + path.read_text())
    assert report.read_log(path)[0] == {"kind": "warning", "message": "metrics.jsonl line 1 cannot be read and was left out"}
    assert "line 1 cannot be read" in Page(report.write_report(run).read_text()).text


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
    run = write_run(tmp_path / "run", [record for record in records() if record.get("step", 0) <= 10])
    assert "Step 10, 25% of the budget" in Page(report.write_report(run).read_text()).text


def test_summary_compares_first_and_last_step() -> None:
    rows = {row.name: row for row in report.summary_rows(records())}
    rmse, miou = rows["ridge/depth_rmse"], rows["ridge/seg_miou"]
    assert (rmse.first_step, rmse.last_step, rmse.first, rmse.last) == (0, 40, 0.6, pytest.approx(0.56))
    assert rmse.change == pytest.approx(-0.04)
    assert rmse.percent == pytest.approx(-100 / 15)
    assert rmse.better is True
    assert miou.better is False
    assert rows["ridge/depth_delta1"].better is None  # unchanged
    assert rows["odd"].better is None  # nobody knows which way is good


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("linear_bn/depth_abs_rel", False),
        ("depth_rmse_per_image", False),
        ("nll", False),
        ("feedback_loss", False),
        ("gsm8k/strict_acc", True),
        ("imagenet_accuracy", True),
        ("roxford_map", True),
        ("seg_miou", True),
        ("acceleration", None),
    ],
)
def test_which_way_is_better(name: str, better: bool | None) -> None:
    assert report.SummaryRow(name, 0, 1.0, 9, 2.0).better is better
    assert report.SummaryRow(name, 0, 1.0, 9, math.nan).better is None
    assert report.SummaryRow(name, 0, 1.0, 0, None).better is None


def test_a_step_logged_twice_counts_once() -> None:
    log = [{"kind": "probe", "step": step, "metrics": {"acc": value}} for step, value in ((0, 0.1), (5, 0.2), (5, 0.3), (2, 0.9))]
    (row,) = report.summary_rows(log)
    assert (row.first, row.last_step, row.last) == (0.1, 5, 0.3)


def test_many_pictures_are_thinned_to_the_bound(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    for step, pixels in enumerate(noise):
        save_figure(run, f"masks-step{step:06d}", pixels)
        save_figure(run, f"depth-step{step:06d}", pixels)

    def shown() -> dict[str, list[int]]:
        return {name: [picture.step for picture in group] for name, group in report._pictures(run / "figures").groups.items()}

    assert shown() == {name: [0, 2, 3, 5, 6, 8, 9, 11] for name in ("depth", "masks")}
    size = (run / "figures" / "masks-step000000.png").stat().st_size
    monkeypatch.setattr(report, "MAX_IMAGE_BYTES", int(6.5 * size))
    assert shown() == {name: [0, 6, 11] for name in ("depth", "masks")}
    monkeypatch.setattr(report, "MAX_IMAGE_BYTES", int(2.5 * size))
    assert shown() == {"depth": [0, 11]}
    assert report._pictures(run / "figures").num_left_out == 22
    assert "22 more in the folder" in Page(report.write_report(run).read_text()).text


def test_a_half_written_picture_is_left_out(run: Path) -> None:
    save_figure(run, "masks-step000000")
    whole = save_figure(run, "masks-step000001", np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8))
    (run / "figures" / "masks-step000001.png").write_bytes(whole[: len(whole) // 2])
    (run / "figures" / "masks-step000002.png").write_bytes(b"")
    assert [picture.step for picture in report._pictures(run / "figures").groups["masks"]] == [0]


@pytest.mark.parametrize("values", [[1.0], [math.nan, math.nan], [1e-9, 2e-9], [1e12, -1e12], [0.0] * 1000, [math.nan, *range(999)]])
@pytest.mark.filterwarnings("error")
def test_every_series_can_be_drawn(values: list[float]) -> None:
    svg = str(curve(dict(enumerate(values)), "k"))
    assert svg.startswith("<svg")
    assert "#0" not in svg.replace("#k-", "")  # no colour of its own: all follow the page
    assert len(svg) < 40_000
