"""Floating-point operations of a computation, and the peak of GPUs."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
    shape_wrapper,
)

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


class _Counter(TorchDispatchMode):
    """torch's FlopCounterMode without its hooks on modules, which gradients by a task trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        aten: Any = torch.ops.aten
        self.formulas = {  # torch counts the attention kernels of GPUs alone
            **flop_registry,
            aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
            aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
                _attention_backward
            ),
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=made)
        return made


def peak_of(card: str | None) -> float | None:
    """Return the FLOP/s of the GPU of that name, or None."""
    return next((peak for name, peak in PEAKS.items() if card and name in card), None)


def utilisation(flops: float, seconds: float, card: str | None) -> float | None:
    """Return the share of the card's peak that `flops` in `seconds` are, or None."""
    peak = peak_of(card)
    return flops / seconds / peak if peak else None


def _attention(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)
