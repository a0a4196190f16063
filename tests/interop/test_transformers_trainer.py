"""Steering inside transformers.Trainer: token weights of a tiny model, by its own loss."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metavpt import Learned, OneStep, Steering
from metavpt.interop.transformers_trainer import SteeringMixin

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


class Weighted(nn.Module):
    """Linear regression with a weight for each sample, as a transformers model is called."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x, y, weight=None):
        loss = (self.linear(x) - y).square().mean(dim=1)
        return {"loss": loss.mean() if weight is None else (weight * loss).mean()}


class Sources(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        weight = 2 * self.logits.softmax(0)[batch["source"]]
        return {"x": batch["x"], "y": batch["y"], "weight": weight}


def test_mixin_learns_which_samples_count(tmp_path):
    """Source 0 agrees with the feedback, source 1 does not."""
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    source = torch.arange(64) % 2
    y = torch.where(source[:, None] == 0, x[:, :2], -x[:, :2])
    rows = [{"x": x[i], "y": y[i], "source": source[i]} for i in range(64)]
    labelled = [{"x": x[::2], "y": y[::2]}]
    designer = Sources()

    class Steered(SteeringMixin, transformers.Trainer):
        def make_steering(self, optimizer):
            loss = lambda theta, task: functional_call(self.model, theta, (), task)["loss"]
            strategy = Learned(OneStep(), lambda p: torch.optim.Adam(p, lr=0.1), every=1)
            return Steering(self.model, designer, loss, loss, labelled, optimizer, strategy)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=16,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Steered(model=Weighted(), args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.steering.budget.steps == 20
    assert designer.logits[0] > designer.logits[1] + 0.5
