"""Parameters, memory and schedule of a run, without its data, weights or GPU.

`trainer.dry_run=true` prints them. Memory is counted on the meta device, where tensors have a size
and no storage.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, open_dict
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from metavpt.data.absent import ABSENT
from metavpt.data.loader import Batch
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.training.schedule import warm_up_names
from metavpt.training.trainer import Trainer

NUM_IMAGES = 2  # images that activations are counted on
NOTE = (
    "activations: tensors that autograd keeps for the pretraining loss of {images} images, on the "
    "meta device with fused attention, "
    "times batch_size / {images}. float32. Not included: temporary tensors "
    "inside an operation, the CUDA context, probes, and a "
    "designer update (the graph of meta_batch_size images through trunk and designer, and the tail "
    "once more)."
)


def without_files(cfg: DictConfig) -> DictConfig:
    """Move a configuration to the meta device, with random weights and stand-ins for the data.

    Trackers are turned off.

    Raises:
        MetaVPTError: The problem cannot be built without its files.
    """
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.device, cfg.tracker = "meta", {}
        for key, value in {"pretrained": False, "weights": None}.items():
            if key in (cfg.get("backbone") or {}):
                cfg.backbone[key] = value
        if "probes" in cfg.problem:
            cfg.problem.probes = None
        data: Any = cfg.get("data")
        if not cfg.get("backbone") or not data:
            raise MetaVPTError(
                "trainer.dry_run=true: needs a problem with the configuration groups "
                "backbone and data"
            )
        for node in [data] if "_target_" in data else data.values():
            if node._target_ not in ABSENT:
                raise MetaVPTError(
                    f"trainer.dry_run=true: no stand-in for {node._target_}, only for "
                    f"{', '.join(ABSENT)}"
                )
            node._target_, node.path, node.unlabelled = ABSENT[node._target_], None, None
    return cfg


def plan(trainer: Trainer) -> Group:
    """Return the tables of a trainer whose problem is on the meta device."""
    return Group(
        _parameters(trainer),
        "",
        _memory(trainer),
        NOTE.format(images=NUM_IMAGES),
        "",
        *_schedule(trainer),
    )


def _parameters(trainer: Trainer) -> Table:
    problem, learner = trainer.problem, params.named(trainer.problem.learner)
    aligned, fresh = set(problem.aligned_parameters()), set(warm_up_names(problem))
    table = _table("parameters", "number")
    for name, counted in {
        "learner": learner.values(),
        "  backbone": (p for name, p in learner.items() if name not in fresh),
        "  head": (p for name, p in learner.items() if name in fresh),
        "  aligned (S)": (p for name, p in learner.items() if name in aligned),
        "designer": problem.designer.parameters(),
        **{name: module.parameters() for name, module in _others(trainer)},
    }.items():
        table.add_row(name, f"{sum(p.numel() for p in counted):,}")
    return table


def _memory(trainer: Trainer) -> Table:
    problem = trainer.problem
    learner, designer = list(problem.learner.parameters()), list(problem.designer.parameters())
    optimizer = getattr(trainer.strategy, "optimizer", None)
    rows = {
        "learner: weights": num_bytes(learner),
        "learner: gradients": num_bytes(p for p in learner if p.requires_grad),
        "learner: optimizer": state_bytes(trainer.optimizer),
        "designer: weights, gradients": 2 * num_bytes(designer),
        "designer: optimizer": state_bytes(optimizer) if optimizer else 0,
        **{
            name: num_bytes([*module.parameters(), *module.buffers()])
            for name, module in _others(trainer)
        },
        "activations": activation_bytes(problem) * cast(Any, problem).batch_size,
    }
    table = _table("memory", "")
    for name, size in {**rows, "together": sum(rows.values())}.items():
        table.add_row(name, _size(size))
    return table


def activation_bytes(problem: Any) -> float:
    """Return the bytes per image that autograd keeps for the pretraining loss on the recipe."""
    # The recipe is drawn for real: the draws decide how many tokens are computed.
    with torch.no_grad():
        task = problem.recipe(Batch(torch.zeros(NUM_IMAGES, 3, 64, 64, dtype=torch.uint8), seed=0))
    task = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), task)
    theta = params.named(problem.learner)
    modules = [module for module in vars(problem).values() if isinstance(module, nn.Module)]
    kept = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    with torch.device("meta"):
        return saved_bytes(lambda: problem.pretrain_loss(theta, task), kept) / NUM_IMAGES


def _schedule(trainer: Trainer) -> Iterable[Table | str]:
    total = trainer.budget.limits.get("steps")
    if total is None:
        yield (
            "schedule: the budget has no limit in steps, so the learning rate follows the share "
            "of the budget that is spent"
        )
        return
    table = _table("step", "learning rate", "of the heads")
    steps = {
        0,
        trainer.head_warmup_steps,
        trainer.schedule.warmup_steps,
        total // 4,
        total // 2,
        3 * total // 4,
        total,
    }
    for step in sorted(step for step in steps if step <= total):
        trainer.budget.steps = int(step)
        trainer._schedule()
        by_warmth = {group["warm"]: group["lr"] for group in trainer.optimizer.param_groups}
        table.add_row(
            f"{step:,.0f}",
            *(f"{by_warmth[warm]:.3g}" if warm in by_warmth else "" for warm in (False, True)),
        )
    yield table
    period = getattr(trainer.strategy, "period", None)
    optimizer = getattr(trainer.strategy, "optimizer", None)
    if period and optimizer:
        due: list[int] = []
        for step in range(int(total)):
            trainer.budget.steps = step
            if period.due(trainer.budget):
                due.append(step)
        lr = optimizer.param_groups[0]["lr"]
        start = f"from step {due[0]:,} on, " if due else ""
        yield (
            f"designer: an update every {period.every} steps {start}{len(due):,} in all, "
            f"learning rate {lr:.3g}"
        )


def _others(trainer: Trainer) -> list[tuple[str, nn.Module]]:
    """Return the problem's modules other than learner and designer: teacher, feedback heads."""
    own = ("learner", "designer")
    found = [
        (name, module)
        for name, module in vars(trainer.problem).items()
        if isinstance(module, nn.Module) and name not in own
    ]
    return [(name, module) for name, module in found if any(True for _ in module.parameters())]


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _table(*columns: str) -> Table:
    table = Table(columns[0], box=None, header_style="dim")
    for title in columns[1:]:
        table.add_column(title, justify="right")
    return table


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the elements of `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the optimizer's state after a step. Parameters are on the meta device."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return num_bytes(leaf for leaf in tree_leaves(optimizer.state) if isinstance(leaf, Tensor))


def saved_bytes(loss: Callable[[], Any], kept: Iterable[Tensor]) -> int:
    """Return the bytes that autograd saves for the backward pass of loss(), each storage once.

    Attention counts as in the fused kernels, without an N x N matrix. No gradient is computed.

    Args:
        loss: Computes the loss.
        kept: Tensors that are in memory anyway. They do not count.
    """
    counted: dict[int, torch.UntypedStorage] = {}
    known = {tensor.untyped_storage()._cdata for tensor in kept}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            counted[storage._cdata] = storage  # kept alive, so that its id stays unique
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FusedAttention():
        loss()
    return sum(storage.nbytes() for storage in counted.values())


class _FusedAttention(TorchFunctionMode):
    """Replaces attention, since torch would keep all probabilities on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Keeps the tensors that flash attention keeps: inputs, output, and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError
