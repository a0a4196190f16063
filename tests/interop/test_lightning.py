"""Steering as a Lightning callback, on the README's problem."""

import pytest
import torch
from channels import Channels

pytest.importorskip("lightning.pytorch")
from lightning.pytorch import LightningModule, Trainer

from metavpt import Learned, OneStep, Steering, named
from metavpt.interop.lightning import SteeringCallback


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.problem = Channels()
        self.learner = self.problem.learner

    def training_step(self, task, _):
        return self.problem.pretrain_loss(named(self.learner), task)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.learner.parameters(), lr=1e-2)


def fit(tmp_path, max_steps, checkpoint=None):
    torch.manual_seed(0)
    module = Module()
    problem = module.problem
    unlabelled = [b for b, _ in zip(problem.pretrain_batches(1), range(12), strict=False)]
    labelled = [b for b, _ in zip(problem.feedback_batches(2), range(4), strict=False)]

    def steer(module, optimizer):
        strategy = Learned(OneStep(), lambda p: torch.optim.Adam(p, lr=0.05), every=2)
        losses = problem.pretrain_loss, problem.feedback_loss
        return Steering(problem.learner, problem.designer, *losses, labelled, optimizer, strategy)

    callback = SteeringCallback(steer)
    trainer = Trainer(
        max_steps=max_steps,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(unlabelled, batch_size=None)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return module, callback, trainer


def test_callback_trains_the_designer_and_gives_the_module_its_tasks(tmp_path):
    module, callback, trainer = fit(tmp_path, 6)
    assert callback.steering.budget.steps == 6
    assert module.problem.designer.logits.detach().abs().max() > 0
    assert "training_step" not in vars(module)
    assert trainer.callback_metrics["steering/value"].isfinite()


def test_callback_state_is_in_the_checkpoint(tmp_path):
    module, _, trainer = fit(tmp_path, 4)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    resumed, callback, _ = fit(tmp_path, 8, tmp_path / "saved.ckpt")
    assert callback.steering.budget.steps == 8
    assert not torch.equal(resumed.problem.designer.logits, module.problem.designer.logits)
