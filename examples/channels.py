import torch
from torch import nn
from torch.func import functional_call

from metavpt import Problem


class ChannelWeights(nn.Module):
    """The designer: a weight for each channel of the reconstruction, all equal at first."""

    def __init__(self, num_channels):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_channels))

    def forward(self, batch):
        return batch, self.logits.softmax(0)


class Channels(Problem):
    """An autoencoder too narrow for its 16 channels; the feedback needs only the first four."""

    metric_directions = {"useful_mse": "lower"}

    def __init__(self):
        self.learner = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 16))
        self.designer = ChannelWeights(16)

    def pretrain_batches(self, seed):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(64, 16, generator=generator)

    def feedback_batches(self, seed):
        return ((x, x[:, :4]) for x in self.pretrain_batches(seed))

    def pretrain_loss(self, theta, task):
        x, weights = task
        return (weights * (functional_call(self.learner, theta, (x,)) - x) ** 2).sum(1).mean()

    def feedback_loss(self, theta, batch):
        x, y = batch
        return ((functional_call(self.learner, theta, (x,))[:, :4] - y) ** 2).mean()

    def evaluate(self):
        x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(123))
        with torch.no_grad():
            return {"useful_mse": ((self.learner(x) - x)[:, :4] ** 2).mean().item()}
