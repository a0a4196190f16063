"""The shipped vision problem on random pixels, with crops made beforehand."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from metavpt.data.absent import AbsentFrames
from metavpt.data.dense import DenseData
from metavpt.dense_tasks.depth import DepthTask
from metavpt.dense_tasks.segmentation import SegmentationTask
from metavpt.designers.masks import MaskDesigner, UNet
from metavpt.designers.views import Views
from metavpt.feedback.dense import DenseFeedback
from metavpt.hypergradients import params
from metavpt.hypergradients.mixed_products import Loss
from metavpt.hypergradients.params import Params
from metavpt.learners.vit import create_backbone
from metavpt.problem import move_to_device
from metavpt.problems.dino_dense import DinoDense
from metavpt.strategies.learned import Learned
from metavpt.strategies.selection import Greedy
from metavpt.training.budget import Budget
from metavpt.training.strategy import TrainState
from metavpt.training.streams import Streams

NUM_CLASSES, MAX_STEPS = 13, 32


class Batch(NamedTuple):
    """Unlabelled: both global crops of every image, (2, B, 3, H, W) uint8."""

    images: torch.Tensor
    seed: int


class Shape(NamedTuple):
    """A learner, its head, its batches and the U-Net of its designer."""

    title: str
    backbone: str
    options: dict[str, Any]
    size: int  # pixels of a crop
    batch_size: int
    tail_blocks: int = 2
    num_prototypes: int = 1024
    hidden: int = 512
    bottleneck: int = 128
    num_sets: int = 1  # labelled ones, each with a feedback of depth and one of classes
    labelled: float = 1.0  # labelled frames for an unlabelled image of an update
    unet: tuple[int, int] = (8, 2)  # base and depth, of designer=unet; the paper's are 16 and 3


def tiny(batch_size: int = 16, depth: int = 12, tail_blocks: int = 2, **changed: Any) -> Shape:
    """DINOv3's architecture at ViT-Ti's width, for a CPU."""
    options = {"depth": depth, "embed_dim": 192, "num_heads": 3}
    return Shape(
        f"ViT-Ti, {depth} blocks, batch {batch_size}",
        "vit_tiny_dinov3",
        options,
        64,
        batch_size,
        tail_blocks,
        **changed,
    )


class Vision(DinoDense):
    def __init__(self, shape: Shape, device: str = "cpu", **dino: Any) -> None:
        self.shape, names = shape, [f"set{k}" for k in range(shape.num_sets)]
        frames = AbsentFrames(
            "random", (shape.size, shape.size), NUM_CLASSES, num_train=2, num_val=1
        )
        tasks = [DepthTask(), SegmentationTask(NUM_CLASSES)]
        super().__init__(
            create_backbone(shape.backbone, tail_blocks=shape.tail_blocks, **shape.options),
            recipe=lambda mean, std: (
                lambda crops, seed: Views(
                    crops / 255, crops.new_zeros(0, crops.shape[1], 3, shape.size, shape.size)
                )
            ),
            designer=lambda recipe: MaskDesigner(recipe, UNet(*shape.unet), initial_keep=0.6),
            data={name: DenseData(frames, tasks, num_train=1, num_meta=1) for name in names},
            feedback=dict.fromkeys(names, DenseFeedback),
            num_prototypes=shape.num_prototypes,
            head_hidden=shape.hidden,
            head_bottleneck=shape.bottleneck,
            batch_size=shape.batch_size,
            **dino,
        )
        # at its start either is zero, and so would be every derivative through it
        heads = [
            heads.get_submodule(task) for heads in self._feedback.values() for task in heads.tasks
        ]
        for layer in (*heads, self.designer.network.out):
            torch.nn.init.normal_(layer.weight, std=0.02)
        move_to_device(self, device)

    def fit_heads(self) -> None:
        pass

    def pretrain_batches(self, seed: int) -> Iterator[Batch]:
        return itertools.cycle(unlabelled(self.shape, self.shape.batch_size, 2, seed, self.device))

    def meta_batches(self, seed: int) -> Iterator[Batch]:
        return itertools.cycle(
            unlabelled(self.shape, max(self.shape.batch_size // 4, 1), 2, seed, self.device)
        )

    def feedback_batches(self, seed: int) -> Iterator[Any]:
        size = max(self.shape.batch_size // 4, 1)
        return itertools.cycle(
            [{name: labelled(self.shape, size, seed, self.device) for name in self.sets}]
        )

    def num_samples(self, batch: Batch) -> int:
        return batch.images.shape[1]

    def candidates(self, batch: Batch, num_candidates: int) -> list[Views]:
        rng = torch.Generator().manual_seed(batch.seed)
        views = self.designer.recipe_task(batch)
        return [self.designer.randomize(views, batch, rng) for _ in range(num_candidates)]

    def evaluate(self) -> dict[str, float]:
        return {}


class WholeNetwork(Vision):
    """S = all parameters of the learner: no trunk that could run once."""

    def aligned_parameters(self) -> list[str]:
        return list(params.named(self.learner))

    def pretrain_tail(self, theta: Params, task: Views) -> Loss:
        return lambda theta_s: Vision.pretrain_tail(self, {**theta, **theta_s}, task)({})


class Bench:
    """The state of a training loop at a designer update: models, optimizer moments, batches."""

    def __init__(self, problem: Vision) -> None:
        self.problem, shape = problem, problem.shape
        rng = torch.Generator().manual_seed(0)
        batches = unlabelled(shape, shape.batch_size, MAX_STEPS, seed=0)
        num_labelled = round(shape.labelled * shape.batch_size)
        frames = {name: labelled(shape, num_labelled, seed=0) for name in problem.sets}
        self.streams = Streams(
            itertools.cycle(batches), itertools.cycle(batches), itertools.cycle([frames])
        )
        theta = params.named(problem.learner)
        self.optimizer = torch.optim.AdamW(theta.values(), lr=1e-4)
        for p in theta.values():
            p.grad = 1e-3 * torch.randn(p.shape, generator=rng)
        self.optimizer.step()
        for group in self.optimizer.param_groups:  # as the trainer leaves them
            group["grad_norms"] = [float(p.grad.norm()) for p in group["params"]]
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def state(self) -> TrainState:
        return TrainState(self.problem, self.streams, self.optimizer, Budget(steps=1))

    def plain_step(self) -> None:
        """What Trainer.step does under `strategy=fixed`, short of data, EMA and log."""
        self.step(self.problem.recipe(next(self.streams.pretrain)))

    def step(self, task: Any) -> None:
        self.problem.pretrain_loss(params.named(self.problem.learner), task).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, strategy: Learned) -> None:
        """What Learned does for one hypergradient: tasks by the designer, g_down, the estimator."""
        strategy.estimate(self.state)

    def update_and_step(self, strategy: Learned) -> None:
        """The hypergradient on the learner's own batch, and then its step on the task."""
        strategy.estimate(self.state)
        assert strategy.own
        self.step(strategy.own.task)

    def score(self, num_candidates: int) -> None:
        """A greedy choice, its feedback direction refreshed."""
        Greedy(num_candidates).next_task(self.state)


def unlabelled(
    shape: Shape, batch_size: int, count: int, seed: int, device: Any = "cpu"
) -> list[Batch]:
    rng = torch.Generator().manual_seed(seed)
    pixels = (2, batch_size, 3, shape.size, shape.size)
    return [
        Batch(torch.randint(0, 256, pixels, dtype=torch.uint8, generator=rng).to(device), seed + k)
        for k in range(count)
    ]


def labelled(shape: Shape, batch_size: int, seed: int, device: Any = "cpu") -> SimpleNamespace:
    rng = torch.Generator().manual_seed(seed)
    pixels = (batch_size, shape.size, shape.size)
    return SimpleNamespace(
        image=torch.randint(
            0, 256, (batch_size, 3, *pixels[1:]), dtype=torch.uint8, generator=rng
        ).to(device),
        depth=1 + torch.rand(pixels, generator=rng).to(device),
        label=torch.randint(0, NUM_CLASSES, pixels, generator=rng).to(device),
    )
