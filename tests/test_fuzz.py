"""Damaged or foreign run files: a MetaVPTError that names the file, or a partial result."""

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damaged import SPARE, Reader, assert_survives, growth_alone
from hydra import compose, initialize_config_dir
from PIL import Image

from metavpt.cli.configuration import read_config
from metavpt.cli.one_line_errors import USER_ERRORS, reason
from metavpt.compare import results
from metavpt.errors import MetaVPTError
from metavpt.report import write_report
from metavpt.report.gallery import gallery
from metavpt.report.texts import read_texts
from metavpt.training import checkpoint

CONFIG = (
    "seed: 0\nproblem:\n  _target_: metavpt.problems.sources.Sources\n"
    '  sizes: [1, 2.5, "${seed}"]\ntrainer: {lr: 1e-3, x: null}\n'
)
STATE = {
    "random": 1,
    "problem": {"learner": {"weight": torch.ones(3, 4)}},
    "streams": {"meta": {"epoch": 0, "position": 3}},
}
LOG = "".join(
    json.dumps(record) + "\n"
    for k in range(3)
    for record in (
        {"kind": "train", "step": k, "loss": 1 / (k + 1), "samples": 8 * k},
        {"kind": "probe", "step": k, "metrics": {"rmse": 1.5}},
        {"kind": "time", "step": k, "seconds": {"data": 1.0}},
    )
)
RESULT = results.Result(
    "fixed",
    0,
    step0={"rmse": 2.0},
    metrics={"rmse": 1.0},
    steps=4,
    samples=8,
    grad_evals=4,
    seconds=2.0,
)
TEXTS = {
    "passages": [[["One", 0.5, [["two", 0.5]], None]]],
    "answers": [["What?", "1", "2", False]],
}


def saved(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def row(folder: Path) -> bytes:
    for _ in range(3):
        results.append(folder, RESULT)
    return (folder / results.FILE).read_bytes()


def picture(_: Path) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def read_run_config(path: Path) -> None:
    read_config(path.parent)


def read_own_choice(path: Path) -> None:
    """As a command with --config-dir: every library error that it shows as one line."""
    try:
        with initialize_config_dir(str(path.parent), version_base="1.3"):
            compose(path.stem)
    except USER_ERRORS as error:
        line = reason(error)
        assert path.name in line or "Error" not in line, line
        raise MetaVPTError(f"{path}: {line}") from None


READERS = {
    "checkpoint": Reader("step-00000001.pt", lambda _: saved(STATE), checkpoint.read),
    "config": Reader("config.yaml", lambda _: CONFIG.encode(), read_run_config),
    "own choice": Reader("own.yaml", lambda _: CONFIG.encode(), read_own_choice, 2),
    "log": Reader(
        "metrics.jsonl",
        lambda _: LOG.encode(),
        lambda path: write_report(path.parent),
        4,
        refuses=False,
    ),
    "rows": Reader("rows.jsonl", row, lambda path: results.read(path.parent), refuses=False),
    "texts": Reader(
        "step1.json",
        lambda _: json.dumps(TEXTS).encode(),
        lambda path: read_texts(path.parent),
        refuses=False,
    ),
    "figures": Reader("depth-step1.png", picture, lambda path: gallery(path.parent), refuses=False),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_a_clear_error_or_is_read(reader: str, tmp_path: Path):
    assert_survives(READERS[reader], tmp_path)


def test_reading_a_checkpoint_takes_at_most_twice_what_it_holds(tmp_path: Path):
    path = checkpoint.Checkpoints(tmp_path).save(
        1, {"problem": {"learner": {"weight": torch.ones(15_000_000)}}}
    )
    grown, holds = growth_alone(
        "from metavpt.training import checkpoint", "checkpoint.read(path)", path
    )
    assert holds > 6e7
    assert grown < 2 * holds + SPARE / 8


class Malicious:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("harm",))


def test_a_checkpoint_that_brings_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for data in (pickle.dumps(Malicious()), saved({"random": Malicious()})):
        (tmp_path / "step-00000001.pt").write_bytes(data)
        with pytest.raises(MetaVPTError, match=r"step-00000001\.pt"):
            checkpoint.read(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "harm").exists()
