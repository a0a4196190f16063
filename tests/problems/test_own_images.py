"""A user's labelled images by one command: trained on, probed by class, refused in one line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.command_process import finish
from helpers.own_images import camvid, generate, save

SMALL = [
    "backbone=vit_tiny_dinov3", "backbone.tail_blocks=1", "backbone.embed_dim=24",
    "backbone.depth=2", "backbone.num_heads=2",
    "problem.feature_size=[32,48]", "problem.batch_size=4", "problem.meta_batch_size=4",
    "strategy.every=1", "strategy.burn_in=0",
    "trainer.first_order_every=0", "budget.steps=2", "device=cpu", "threads=1", "output=run",
]  # fmt: skip
CROPS = ["recipe.global_size=32", "recipe.local_size=16"]
NAMES = [
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "walker",
    "rider",
]  # fmt: skip
SEGMENTATION = [
    "data=segmentation",
    "data.path=camvid",
    f"data.classes=[{','.join(NAMES)}]",
    "data.ignore_index=11",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("problem", "options"),
    [
        ("dino", ["designer.hidden_width=8", *CROPS]),
        ("data2vec", ["designer.hidden_width=8"]),
    ],
)
def test_masks_steer_and_are_measured_by_class(
    tmp_path: Path, problem: str, options: list[str]
) -> None:
    camvid(tmp_path / "camvid")
    status, told = finish(tmp_path, f"problem={problem}", *SEGMENTATION, *SMALL, *options)
    assert status == 0, told
    assert "camvid: 20 images to train on, 5 to evaluate on (of the folder val), 11 classes" in told
    assert "NYU" not in told
    assert "rooms" not in told
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    probe = [record["metrics"] for record in records if record["kind"] == "probe"][-1]
    assert 0 < probe["ridge/seg_miou"] < 1
    assert not [metric for metric in probe if "depth" in metric]
    assert [record for record in records if record["kind"] == "designer"]
    report = (tmp_path / "run/report.html").read_text()
    assert "NYU" not in re.sub(r'src="data:[^"]*"', "", report)  # pixels may spell anything
    _, _, table = report.partition("seg_iou by class</h2>")
    for name in NAMES:
        assert f">{name}</th>" in table


def test_depth_maps_steer(tmp_path: Path) -> None:
    for i in range(20):
        image, _, depth = generate(i)
        save(tmp_path / f"mine/images/{i:02d}.png", image)
        save(tmp_path / f"mine/depths/{i:02d}.png", (1000 * depth).astype(np.uint16))
    options = ["data=depth", "data.path=mine", "data.scale=0.001", "designer.hidden_width=8"]
    status, told = finish(tmp_path, "problem=data2vec", *options, *SMALL)
    assert status == 0, told
    assert "mine: 16 images to train on, 4 to evaluate on (20%, drawn at random)" in told
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    probe = [record["metrics"] for record in records if record["kind"] == "probe"][-1]
    assert 0 < probe["ridge/depth_rmse"] < 10
    assert not [metric for metric in probe if "seg" in metric]


def test_a_wrong_mask_is_one_line_before_anything_runs(tmp_path: Path) -> None:
    camvid(tmp_path / "camvid")
    save(tmp_path / "camvid/masks/val/022.png", np.full((24, 32), 99, np.uint8))
    status, told = finish(tmp_path, "problem=dino", *SEGMENTATION, *SMALL, *CROPS)
    (line,) = told.splitlines()
    assert status == 2
    assert "camvid/masks/val/022.png: has the value 99" in line
    assert not (tmp_path / "run").exists()


def test_a_weight_of_labels_that_are_not_there_is_named(tmp_path: Path) -> None:
    camvid(tmp_path / "camvid")
    options = [*SEGMENTATION, *SMALL, "feedback.depth_weight=1"]
    status, told = finish(tmp_path, "problem=dino", *options, *CROPS)
    assert status == 2
    assert "feedback.depth_weight=1" in told
    assert "without depth" in told


def test_a_run_on_own_images_can_be_planned(tmp_path: Path) -> None:
    options = ["data.size=[24,32]", "trainer.dry_run=true", *SEGMENTATION, *SMALL]
    status, told = finish(tmp_path, "problem=dino", *options, *CROPS)
    assert status == 0, told
    assert "activations" in told
