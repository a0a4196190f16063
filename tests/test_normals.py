"""The worked example of a dense task: right on a plane, fed back and probed by the command."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.command_process import EXAMPLES, WITH_EXAMPLES, finish
from helpers.small_dino import SMALL, UNET
from normals import Angles, Normals


def plane(normal: torch.Tensor, height: int = 12, width: int = 16) -> torch.Tensor:
    """Depth of the plane normal . point = -2 as a camera sees it, (1, H, W)."""
    x = (torch.arange(width) + 0.5 - width / 2) / (0.85 * width)
    y = (torch.arange(height) + 0.5 - height / 2) / (0.85 * width)
    rays = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.ones(height, width)])
    return -2 / torch.einsum("c,chw->hw", normal, rays)[None]


def test_normals_of_a_plane_are_its_own_and_holes_are_unknown() -> None:
    normal = torch.nn.functional.normalize(torch.tensor([0.3, -0.2, -1.0]), dim=0)
    depth = plane(normal)
    depth[0, 4, 5] = 0
    target = Normals().target(SimpleNamespace(depth=depth))
    values, known = Normals().encode(target)
    assert int((~known).sum()) == 9
    assert not known[0, 3:6, 4:7].any()
    inner = known.clone()
    inner[:, [0, -1]] = inner[:, :, [0, -1]] = False  # one-sided differences
    expected = normal.expand(int(inner.sum()), 3)
    torch.testing.assert_close(values.movedim(1, -1)[inner], expected, atol=0.02, rtol=0)
    guesses = Normals().trivial([target])
    assert guesses.keys() == {"mean normals image", "constant normals"}
    constant = guesses["constant normals"][:, 0, 0].float()
    torch.testing.assert_close(constant, normal, atol=0.02, rtol=0)


def test_angles_are_means_over_known_pixels() -> None:
    target = torch.zeros(1, 3, 1, 3)
    target[0, 2, 0, :2] = 1.0
    prediction = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]).T[None, :, None]
    metrics = Angles()
    metrics.update(prediction, target)
    assert metrics.compute() == pytest.approx({"mean_angle": 45.0, "within_11": 0.5})


def test_they_are_fed_back_and_probed_by_the_command(tmp_path: Path) -> None:
    options = [*SMALL, *UNET, "strategy.every=1", "strategy.burn_in=0", "budget.steps=2"]
    alone = ["feedback.depth_weight=0", "feedback.segmentation_weight=0"]
    status, told = finish(
        tmp_path, f"--config-dir={EXAMPLES / 'conf'}", "experiment=normals", *options, *alone,
        f"data.rooms.folder={tmp_path}", "device=cpu", "threads=1", "output=run",
        environment=WITH_EXAMPLES,
    )  # fmt: skip
    assert status == 0, told
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    probe = [record["metrics"] for record in records if record["kind"] == "probe"][-1]
    assert 0 < probe["ridge/normals_mean_angle"] < 90
    assert {"ridge/depth_rmse", "ridge/seg_miou", "ridge/normals_within_11"} <= probe.keys()
    assert [record for record in records if record["kind"] == "designer"]
    assert "normals_mean_angle" in (tmp_path / "run/report.html").read_text()
