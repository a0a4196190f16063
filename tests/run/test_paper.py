"""Every row of the paper runs: the same preset with a small model, small data and two steps."""

from pathlib import Path
from typing import Any

import pytest
from helpers.small_language import SMALL
from hydra import compose, initialize_config_module
from rich.console import Console

from metavpt.report.logs import read_log, series_of
from metavpt.training.build import build, check_option_types

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiment"
ROWS = sorted(path.stem for path in EXPERIMENTS.glob("paper_*.yaml"))
TEXT = [name for name in ROWS if name.startswith("paper_lm_")]
IMAGES = [name for name in ROWS if name not in TEXT]
FEW_STEPS = [
    "budget.steps=2", "trainer.schedule.warmup_steps=1", "trainer.first_order_every=0", "threads=1",
]  # fmt: skip
SMALL_IMAGES = [
    *FEW_STEPS, "paper.burn_in=1", "paper.every=1", "trainer.head_warmup_steps=1",
    "backbone.pretrained=false", "+backbone.embed_dim=48", "+backbone.depth=5",
    "+backbone.num_heads=4", "+backbone.img_size=32", "+backbone.patch_size=8",
    "data.path=null", "data.unlabelled=[frames]", "data.stream_size=null", "data.num_train=4",
    "data.num_meta=2", "data.rooms.num_frames=10", "data.rooms.size=[32,48]",
    "problem.batch_size=4", "problem.meta_batch_size=2", "problem.feedback_batch_size=2",
    "problem.first_head_steps=1", "problem.feature_size=[32,48]", "problem.num_workers=0",
    "problem.probes=null", "+problem.probe_heads.linear_bn.num_steps=3",
]  # fmt: skip
SMALL_DINO = [
    "problem.num_prototypes=16", "problem.head_hidden=16", "problem.head_bottleneck=8",
    "recipe.global_size=32", "recipe.local_size=16", "recipe.num_local=2",
]  # fmt: skip
SMALL_TEXT = [
    *FEW_STEPS, "strategy.every=1", "learner=tiny_lm", "learner.model_type=qwen2",
    "+learner.num_key_value_heads=2",
    "data=arithmetic",
    *(option for option in SMALL if not option.startswith("problem=")), "designer.num_candidates=6",
    "problem.batch_size=32",
]  # fmt: skip


def trained(folder: Path, *overrides: str) -> tuple[Any, list[dict[str, Any]]]:
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", list(overrides))
    check_option_types(cfg)
    trainer = build(cfg, folder / "run", Console(quiet=True))
    trainer.run()
    trainer.log.close()
    return trainer, read_log(folder / "run" / "metrics.jsonl")


@pytest.mark.parametrize("name", IMAGES)
def test_a_row_on_images_runs(name: str, tmp_path: Path) -> None:
    small = [*SMALL_IMAGES, f"data.rooms.folder={tmp_path}"]
    if name == "paper_ijepa_vith":
        small += ["recipe.size=32", "designer.network.patch_size=8", "designer.min_visible=1"]
        small += ["problem.predictor={width: 16, depth: 1, num_heads: 2}"]
    else:
        small += SMALL_DINO
    small += ["data.num_classes=13"] if "ade20k" not in name else ["data.size=[32,48]"]
    small += (
        ["designer.network={base: 4, depth: 2}"]
        if name != "paper_ijepa_vith" and ("vitl" in name or "ade20k" in name)
        else []
    )
    trainer, log = trained(tmp_path, f"experiment={name}", *small)
    assert trainer.metrics["linear_bn/seg_miou"] >= 0
    assert ("linear_bn/depth_rmse" in trainer.metrics) == ("ade20k" not in name)
    assert trainer.strategy.period.num_updates == 1  # after the burn-in
    assert list(series_of(log, "designer")["value"]) == [2]
    assert trainer.execution.precision.precision == "bf16-mixed"


@pytest.mark.parametrize("names", [*TEXT, "paper_lm_qwen25_05b,paper/all_weights"])
def test_a_row_on_text_runs(names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "tokenizers"))
    trainer, log = trained(tmp_path, f"experiment=[{names}]", *SMALL_TEXT)
    learner, with_adapters = trainer.problem.learner, names in TEXT
    trained_names = [name for name, p in learner.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in trained_names) == with_adapters
    assert {"answers/nll", "answers/pass@1_strict", "answers/sampled_pass@16_strict"} <= set(
        trainer.metrics
    )
    assert trainer.strategy.period.num_updates == 2
    assert list(series_of(log, "designer")["value"]) == [1, 2]
    assert trainer.execution.accumulate == (8 if with_adapters else 32)
