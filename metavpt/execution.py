"""How the blocks of a learner run: compiled, or with activations that are made again."""

from collections.abc import Iterable

from torch import nn

from metavpt.errors import MetaVPTError


def compile_blocks(learner: nn.Module, backend: str) -> None:
    """torch.compile of each block by itself, in place: one compilation serves blocks of one shape, and the rest stays as it is.

    Compiled functions have no second derivative (pytorch #91469), so what takes hypergradients must run them eagerly:
    `torch.compiler.set_stance("force_eager")`.
    """
    for block in _blocks(learner):
        block.compile(backend=backend)


def recompute_blocks(learner: nn.Module) -> None:
    """Keep the input of each block instead of what is in it, see `learners.recompute`."""
    able = [module for module in learner.modules() if hasattr(module, "recompute")]
    if not able:
        raise MetaVPTError(f"trainer.recompute=true: {type(learner).__name__} has no part with an attribute `recompute`")
    for module in able:
        module.recompute = True  # pyright: ignore[reportArgumentType]


def _blocks(learner: nn.Module) -> Iterable[nn.Module]:
    found = [block for module in learner.modules() if isinstance(module, nn.ModuleList | nn.ModuleDict) for block in module.children()]
    inner = {id(part) for block in found for part in block.modules() if part is not block}
    blocks = [block for block in found if id(block) not in inner]
    if not blocks:
        raise MetaVPTError(f"trainer.compile: {type(learner).__name__} has no blocks, members of a ModuleList or ModuleDict, to compile")
    return blocks
