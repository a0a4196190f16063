"""Every choice of every configuration group composes; every strategy and budget can be built."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

CONFIGS = Path(__file__).parents[1] / "configs"
CHOICES = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name != "experiment"
)
STRATEGIES = sorted(path.stem for path in (CONFIGS / "strategy").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
EXTRA = {
    "backbone=timm": ["backbone.name=vit_tiny_patch16_224"],
    "data=gsm8k": ["data.path=/path/to/data"],
    "experiment=smollm2_quiet": ["data.path=/path/to/data"],
    "data=segmentation": ["data.path=/path/to/data"],
    "data=depth": ["data.path=/path/to/data", "data.scale=0.001"],
}
LANGUAGE = {  # choices that only a language problem has a use for
    "data=gsm8k", "data=numina_gsm8k", "strategy=greedy_targets", "strategy=random_tilt",
    "strategy=self_distillation", "strategy=smoothing", "strategy=tilt",
}  # fmt: skip


def composed(*overrides):
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        return compose("run", list(overrides))


@pytest.mark.parametrize("choice", CHOICES + [f"experiment={name}" for name in EXPERIMENTS])
def test_every_choice_composes_and_resolves(choice):
    extra = EXTRA.get(choice, [])
    problem = ["problem=lm_gsm8k"] if choice in LANGUAGE else []
    assert OmegaConf.to_container(composed(*problem, choice, *extra), resolve=True)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_can_be_built(name):
    choice = f"strategy={name}"
    problem = ["problem=lm_gsm8k"] if choice in LANGUAGE else []
    assert hasattr(instantiate(composed(*problem, choice).strategy), "next_task")


def test_the_paper_row_of_nyuv2_with_vit_b_holds_the_papers_figures():
    """V-Pretraining, table of hyper-parameters."""
    cfg = composed("problem=dino_masks", "experiment=paper_nyuv2_vitb")
    assert (
        cfg.trainer.optimizer.lr,
        cfg.problem.batch_size,
        cfg.strategy.every,
        cfg.problem.meta_batch_size,
    ) == (8.58e-6, 256, 8, 64)
    assert (cfg.backbone.tail_blocks, cfg.strategy.optimizer.lr, cfg.designer.keep) == (
        3,
        2.21e-4,
        0.4,
    )
    assert (cfg.designer.sparsity_weight, cfg.designer.tv_weight) == (0.111, 0.0417)
    assert (cfg.feedback.segmentation_weight, cfg.feedback.depth_weight) == (16, 2)
