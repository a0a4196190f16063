"""The runs of tests/distributed/test_collectives.py, for two processes or for one, in float64."""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from helpers import two_ranks_shared
from helpers.traffic import Traffic
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from metavpt import (
    Budget,
    Checkpoints,
    DifferenceProduct,
    ExactProduct,
    Implicit,
    Learned,
    OneStep,
    Problem,
    RunLog,
    Trainer,
    Unrolled,
)
from metavpt.distributed import collectives, fsdp
from metavpt.hypergradients import params
from metavpt.training.engine import make_fabric
from metavpt.training.run_log import UnwrittenLog

ESTIMATORS = {
    "one_step": lambda product: OneStep(product=product),
    "unrolled": lambda product: Unrolled(2, product=product),
    "implicit": lambda product: Implicit(damping=1e2, product=product),
    "own_batch": lambda product: OneStep(product=product),
}
PRODUCTS = {"small": ExactProduct(), "dino": DifferenceProduct()}
STEPS = {"small": 4, "dino": 3}  # the designer is updated in every other one
COUNTED = 2  # the step whose traffic is counted: one with an update, and a learner's step before it
CLIP_NORM = 0.5  # below all norms of both problems
DINO = [
    "problem=dino_masks", "backbone.tail_blocks=1", "backbone.embed_dim=24", "backbone.depth=3",
    "backbone.num_heads=2",
    "recipe.global_size=16", "recipe.local_size=8", "recipe.num_local=1", "designer=unet",
    "designer.network.base=4",
    "designer.network.depth=1",
    "data.rooms={num_frames: 20, size: [32, 48], seed: 0, folder: null}", "data.num_train=8",
    "data.num_meta=4",
    "problem.feature_size=[16, 24]", "problem.num_prototypes=16", "problem.head_hidden=8",
    "problem.head_bottleneck=4",
    "problem.batch_size=4", "problem.meta_batch_size=4", "problem.feedback_batch_size=4",
    "problem.head_steps=1",
    "problem.first_head_steps=2",
]  # fmt: skip


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        # of seven rows two processes hold unlike shares, and of one row the second holds nothing
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(k, 13 - k), nn.Tanh()) for k in (6, 7))
        self.scale = nn.Parameter(torch.ones(6))
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x * self.scale * self.gain


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(6))

    def forward(self, batch):
        return batch, self.logits.softmax(0)


class Small(Problem):
    """Two blocks and a linear tail reconstruct their input. The designer weighs channels."""

    def __init__(self, folder=None):
        self.learner = nn.ModuleDict({"trunk": Trunk(), "tail": nn.Linear(6, 6)}).double()
        self.designer = Weights().double()

    def pretrain_batches(self, seed):
        rng = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(8, 6, generator=rng, dtype=torch.float64)

    def feedback_batches(self, seed):
        return ((x, x[:, :2]) for x in self.pretrain_batches(seed))

    def pretrain_loss(self, theta, task):
        return self.pretrain_tail(theta, task)({})

    def pretrain_tail(self, theta, task):
        x, weights = task
        states = self._trunk(theta, x * (1 + weights))
        return lambda theta_s: (
            (weights * (self._tail({**theta, **theta_s}, states) - x) ** 2).sum(1).mean()
        )

    def feedback_loss(self, theta, batch):
        x, y = batch
        return ((self._outputs(theta, x)[:, :2] - y) ** 2).mean()

    def evaluate(self):
        return {}

    def aligned_parameters(self):
        return ["tail.weight", "tail.bias"]

    def trunks(self):
        return [self.learner["trunk"]]

    def _outputs(self, theta, x):
        return self._tail(theta, self._trunk(theta, x))

    def _trunk(self, theta, x):
        return functional_call(self.learner["trunk"], params.subset(theta, "trunk."), (x,))

    def _tail(self, theta, states):
        return functional_call(self.learner["tail"], params.subset(theta, "tail."), (states,))


class Doubled(nn.Module):
    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe

    def forward(self, images, seed):
        return self.recipe((images / 255).double(), seed)


def dino(folder):
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", [*DINO, f"data.rooms.folder={folder}/rooms"])
    problem = instantiate(cfg.problem, _convert_="all")
    for module in (problem.learner, problem.teacher, problem.designer, problem.feedback):
        module.double()
    problem.designer.initial_keep = 0.5  # away from the kink of the clamp
    # away from gradients that are zero but for rounding, which Adam would make steps of
    nn.init.normal_(problem.designer.network.out.weight, std=0.05)
    for head in (problem.feedback["labelled"].depth, problem.feedback["labelled"].segmentation):
        nn.init.normal_(head.weight, std=0.1)
    nn.init.constant_(problem.feedback["labelled"].depth.bias, 3.0)
    problem.designer.recipe = Doubled(problem.designer.recipe)
    problem.evaluate, problem.figures = dict, dict
    return problem


PROBLEMS = {"small": Small, "dino": dino}


class Recorded(Learned):
    """Keeps the hypergradients; kills its process in the step `dies_at`."""

    dies_at, found = None, ()

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.traffic = Traffic()

    def next_task(self, state):
        if state.budget.steps == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().next_task(state)

    def update(self, state):
        with self.traffic.of("update"):
            return super().update(state)

    def estimate(self, state):
        estimate, batch = super().estimate(state)
        self.found = (*self.found, estimate.by_phi)
        return estimate, batch


class Counted(Trainer):
    """Counts what the step `COUNTED` sends."""

    def step(self):
        with self.strategy.traffic if self.budget.steps == COUNTED else nullcontext():
            super().step()


def trainer_of(folder, problem, estimator, fabric=None):
    torch.manual_seed(0)
    made = PROBLEMS[problem](folder.parent)
    strategy = Recorded(
        ESTIMATORS[estimator](PRODUCTS[problem]),
        lambda p: torch.optim.Adam(p, lr=1e-2),
        every=2,
        own_batch=estimator == "own_batch",
    )
    log = RunLog(folder) if collectives.rank() == 0 else UnwrittenLog(folder)
    options = {
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        "log_every": 1,
        "clip_norm": CLIP_NORM,
        "checkpoint_every": int(problem == "small"),
        "fabric": fabric,
    }
    return Counted(
        made,
        strategy,
        Budget(steps=STEPS[problem]),
        log,
        Checkpoints(folder / "checkpoints", keep=9),
        **options,
    )


def outcome(folder, trainer):
    """Losses and gradient norms of the steps, hypergradients, all weights, and bytes sent."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    return {
        **{
            name: torch.tensor([line[name] for line in train], dtype=torch.float64)
            for name in ("loss", "grad_norm")
        },
        "samples": [line["samples"] for line in train],
        "hypergradients": list(trainer.strategy.found),
        "problem": fsdp.gathered(trainer.problem.state_dict()),
        "sent": dict(trainer.strategy.traffic.sent),
        "sizes": sizes(trainer.problem),
    }


def sizes(problem):
    """Numbers of parameters; of a sharded trunk with the rows that pad it to equal shards."""
    found, aligned = Counter(), problem.aligned_parameters()
    for name, p in problem.learner.named_parameters():
        if isinstance(p, DTensor):
            held = p.device_mesh.size(-1)
            count = -(-len(p) // held) * held * (p.numel() // len(p))
            found.update({"trunk": count, "outside_blocks": 0 if "blocks." in name else count})
        else:
            found["aligned" if name in aligned else "others"] += p.numel()
    found["designer"] = sum(p.numel() for p in params.named(problem.designer).values())
    return dict(found)


def largest_difference(a, b):
    """The largest difference of two structures, relative to the largest entry of each tensor."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((largest_difference(a[name], b[name]) for name in a), default=0.0)
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        return max((largest_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, torch.Tensor) and a.is_floating_point():
        return float((a - b).abs().max() / a.abs().max().clamp_min(1e-3)) if a.numel() else 0.0
    return 0.0


def checkpoints_of(run, steps, folder, damaged=None):
    """Copies of a run's checkpoints of these steps, alone in a folder, with one bit flipped."""
    if collectives.rank() == 0:
        (folder / "checkpoints").mkdir(parents=True)
        for step in steps:
            (path,) = (run / "checkpoints").glob(f"step-{step:08d}*")
            (shutil.copytree if path.is_dir() else shutil.copy)(
                path, folder / "checkpoints" / path.name
            )
        if damaged:
            (shard,) = (folder / "checkpoints").glob(damaged)
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)
        (folder / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    collectives.first(None)
    return folder


def run(folder, problem, estimator, fabric=None, dies_at=None):
    trainer = trainer_of(folder, problem, estimator, fabric)
    trainer.strategy.dies_at = dies_at
    if trainer.checkpoints.paths():
        trainer.resume()
    trainer.run()
    return outcome(folder, trainer)


def layouts(folder, parallel):
    """How trunks are laid out over the processes."""
    fabric = make_fabric("cpu", parallel=parallel)
    learner = trainer_of(folder / f"laid-{parallel}", "small", "one_step", fabric).problem.learner
    found = {str(p.placements) for p in learner.parameters() if isinstance(p, DTensor)}
    return sorted(found)


def main(folder):
    """Run every problem, estimator and kind of parallelism, and resume checkpoints of others.

    Then a run whose second process dies, which torchrun starts again.
    """
    restarted = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
    fabrics = {parallel: make_fabric("cpu", parallel=parallel) for parallel in ("ddp", "fsdp")}
    runs = [
        f"{problem}-{estimator}-{parallel}"
        for problem in PROBLEMS
        for estimator in ESTIMATORS
        for parallel in fabrics
    ]
    goes_on = {
        "small-one_step-ddp-from_one": ("one", [2], None),
        "small-one_step-fsdp-from_one": ("one", [2], None),
        "small-one_step-ddp-from_fsdp": ("small-one_step-fsdp", [2], None),
        "small-one_step-fsdp-from_damaged": (
            "small-one_step-fsdp",
            [2, 3],
            "step-00000003/shard-00002*",
        ),
    }
    for name in [*runs, *goes_on] if not restarted else []:
        problem, estimator, parallel, *_ = name.split("-")
        if name in goes_on:
            origin, steps, damaged = goes_on[name]
            checkpoints_of(folder / origin, steps, folder / name, damaged)
        found = run(folder / name, problem, estimator, fabrics[parallel])
        if collectives.rank() == 0:
            torch.save(found, folder / f"{name}.pt")
    if not restarted:
        shared = two_ranks_shared.numbers()
        shared["sent_by"] = {}
        for part in ("ridge", "cross_fitted"):
            with Traffic() as traffic:
                getattr(two_ranks_shared, part)()
            shared["sent_by"][part] = dict(traffic.sent)
        trainers = {
            name: trainer_of(folder / f"probed-{name}", "dino", "one_step", fabric)
            for name, fabric in fabrics.items()
        }
        shared["dense"] = {
            name: two_ranks_shared.dense(trainer) for name, trainer in trainers.items()
        }
        shared["layouts"] = {name: layouts(folder, name) for name in ("fsdp", "hsdp")}
        if collectives.rank() == 0:
            torch.save(shared, folder / "shared.pt")
    dies_at = 2 if collectives.rank() == 1 and not restarted else None
    found = run(folder / "killed", "small", "one_step", fabrics["fsdp"], dies_at)
    if collectives.rank() == 0:
        torch.save(found, folder / "killed.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
