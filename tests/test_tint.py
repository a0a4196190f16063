"""The worked example of a designer: it starts at the recipe, and the command trains it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from helpers.command_process import EXAMPLES, WITH_EXAMPLES, finish
from helpers.small_dino import SMALL
from tint import Tint

from metavpt.designers.views import MultiCrop


def test_it_starts_at_the_recipe_and_gains_scale_a_colour() -> None:
    recipe = MultiCrop(
        (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), global_size=16, local_size=8, num_local=2
    )
    designer = Tint(recipe)
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    batch: Any = SimpleNamespace(images=images, seed=7)
    task, plain = designer(batch), designer.recipe_task(batch)
    assert torch.equal(task.global_crops, plain.global_crops)
    assert torch.equal(task.local_crops, plain.local_crops)
    with torch.no_grad():
        designer.gain[1] = 0.5
    brighter = designer(batch)
    assert torch.equal(brighter.global_crops[:, :, 1], 1.5 * plain.global_crops[:, :, 1])
    assert torch.equal(brighter.global_crops[:, :, 0], plain.global_crops[:, :, 0])
    assert designer.regularizer(brighter).item() > 0


def test_the_command_trains_it(tmp_path: Path) -> None:
    status, told = finish(
        tmp_path, f"--config-dir={EXAMPLES / 'conf'}", *SMALL, "designer=tint", "strategy.every=1",
        "strategy.burn_in=0", "budget.steps=2", f"data.rooms.folder={tmp_path}",
        "device=cpu", "threads=1", "output=run",
        environment=WITH_EXAMPLES,
    )  # fmt: skip
    assert status == 0, told
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    updates = [record for record in records if record["kind"] == "designer"]
    assert updates
    assert all(update["value"] for update in updates)
    assert list((tmp_path / "run").rglob("*tint*"))
