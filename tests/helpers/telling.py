"""A run that says how its processes start, in a module of its own: another process must find it."""

import multiprocessing as mp

import torch
from helpers.two_ranks import Small

from metavpt import Budget, Fixed, RunLog, Trainer


class Telling(Small):
    """Its only metric is whether processes start by `method` where it is evaluated."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def evaluate(self):
        return {"as asked": float(mp.get_start_method() == self.method)}


def telling(folder, method):
    torch.manual_seed(0)
    return Trainer(Telling(method), Fixed(), Budget(steps=1), RunLog(folder))
