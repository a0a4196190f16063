"""Kernels and compilers under the losses: what double backward would meet."""

import inspect
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metavpt.check.finding import Finding, listed
from metavpt.check.scene import Scene
from metavpt.hypergradients.curvature import GaussNewton
from metavpt.hypergradients.estimators import Estimator
from metavpt.hypergradients.mixed_products import DifferenceProduct
from metavpt.problem import Problem


def compiled(problem: Problem, estimator: Estimator | None = None) -> Finding:
    """Find torch.compile in the learner or in a loss.

    A compiled function has no double backward, and its graph may not be retained. A compiled
    designer is harmless: every estimator differentiates it once.
    """
    found = compiled_parts(problem)
    if not found:
        return Finding("compile", "ok", "neither the learner nor a loss is compiled")
    measured = f"compiled by torch.compile: {listed(found)}"
    advice = (
        "an exact product, and GaussNewton, raises there or is a silent zero: use "
        "DifferenceProduct and Hessian, or do not compile"
    )
    twice = isinstance(getattr(estimator, "curvature", None), GaussNewton)
    if isinstance(getattr(estimator, "product", None), DifferenceProduct) and not twice:
        return Finding(
            "compile",
            "warning",
            measured + f"; {type(estimator).__name__} takes first derivatives alone, which work",
            advice,
        )
    return Finding("compile", "failed", measured, advice)


def compiled_parts(problem: Problem) -> list[str]:
    """List modules of the learner and attributes of the problem that are compiled."""
    modules = [
        f"learner.{name}" if name else "learner"
        for name, module in problem.learner.named_modules()
        if isinstance(module, OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
    ]
    designer = set(problem.designer.modules())
    functions = [
        name
        for name, value in inspect.getmembers_static(problem)
        if hasattr(value, "_torchdynamo_orig_callable")
        and not (isinstance(value, nn.Module) and value in designer)
    ]
    return modules + [name for name in functions if name not in ("learner", "designer")]


def attention(scene: Scene) -> Finding:
    """Report which kernel attention runs in.

    Exact products switch fused kernels off; the finding `exact_product` shows whether that works.
    """
    with torch.no_grad():
        task = scene.task()
    with _Kernels() as kernels, _Calls() as calls:
        scene.pretrain(scene.aligned, task)
    if not calls.count and not kernels.fused:
        return Finding("attention", "ok", "no scaled_dot_product_attention in the pretraining loss")
    kernel = ", ".join(sorted(kernels.fused)) or "not fused"
    return Finding(
        "attention",
        "ok",
        f"{calls.count} attention calls, {kernel}; in exact products unfused (math)",
    )


class _Calls(TorchFunctionMode):
    """Counts calls of scaled_dot_product_attention."""

    count = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.count += getattr(func, "__name__", "") == "scaled_dot_product_attention"
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    """The fused attention kernels that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product") and "math" not in name:
            self.fused.add(name.removeprefix("_scaled_dot_product_"))
        return func(*args, **(kwargs or {}))
