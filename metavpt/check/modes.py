"""Modes to run user code in: float64, and gradients where the code cuts them."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Their numbers differ by dtype: drawn as they would be in the run, and widened afterwards, they
# give the run's own task.
RANDOM = frozenset(
    {
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "normal",
        "bernoulli",
        "randint",
        "randperm",
        "multinomial",
    }
)


class Float64(TorchFunctionMode):
    """float64 for code that asks for float32: `.float()`, `.to(torch.float32)`, new tensors."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            func = Tensor.double
        if getattr(func, "__name__", "") not in RANDOM:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {
                key: torch.float64 if arg is torch.float32 else arg for key, arg in kwargs.items()
            }
        result = func(*args, **kwargs)
        return (
            result.double()
            if isinstance(result, Tensor) and result.dtype is torch.float32
            else result
        )


class Uncut(TorchFunctionMode):
    """`no_grad` and `detach` do nothing: the gradient that there would be without them.

    Enter it where gradients are enabled.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        if func is Tensor.detach:
            return args[0]
        return func(*args, **(kwargs or {}))
