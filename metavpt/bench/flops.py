"""Floating-point operations of a computation, and the peak of GPUs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

# Dense bfloat16 FLOP/s with accumulation in float32, by how the card calls itself, from its maker's
# data sheet; the first that fits.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
}


def count(call: Callable[[], Any]) -> int:
    """Count the FLOPs of matrix products, convolutions and attention in call().

    A multiply-add is two. The formulas are torch's. Compiled code is not seen: count before
    compiling.
    """
    with _Counter() as counter:
        call()
    return counter.total


def peak_of(card: str | None) -> float | None:
    """Return the FLOP/s of the GPU of that name, or None."""
    return next((peak for name, peak in PEAKS.items() if card and name in card), None)


def utilisation(flops: float, seconds: float, card: str | None) -> float | None:
    """Return the share of the card's peak that `flops` in `seconds` are, or None."""
    peak = peak_of(card)
    return flops / seconds / peak if peak else None


class _Counter(TorchDispatchMode):
    """torch.utils.flop_counter.FlopCounterMode without its table by module.

    Its module hooks fail on a graph that enters a frozen teacher.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        aten: Any = torch.ops.aten
        self.formulas = {
            **flop_registry,
            # torch counts the attention kernels of GPUs alone
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := self.formulas.get(func._overloadpacket):
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
