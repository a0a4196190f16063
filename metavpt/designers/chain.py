"""A chain of designers."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from metavpt.designers.designer import Designer
from metavpt.designers.views import MultiCrop, Views
from metavpt.errors import MetaVPTError


class Chain(Designer):
    """Each stage refines the views of the stages before it, for example a policy and then masks.

    Args:
        recipe: Makes the views of the first stage.
        stages: recipe -> designer by name, in order. A PolicyDesigner makes new views and must be
            first.
    """

    def __init__(
        self, recipe: MultiCrop, stages: Mapping[str, Callable[[MultiCrop], Designer]]
    ) -> None:
        super().__init__(recipe)
        if not stages:
            raise MetaVPTError("Chain: designer.stages is empty; name at least one designer")
        self.stages = nn.ModuleDict({name: make(recipe) for name, make in stages.items()})

    @override
    def forward(self, batch: Any) -> Views:
        first, *rest = self._stages
        return self._refine(first(batch), batch, rest)

    @override
    def refine(self, views: Views, batch: Any) -> Views:
        return self._refine(views, batch, self._stages)

    @override
    def randomize(self, views: Views, batch: Any, rng: Generator) -> Views:
        for stage in self._stages:
            views = stage.randomize(views, batch, rng)
        return views

    @override
    def regularizer(self, task: Views) -> Tensor:
        found = [stage.regularizer(task) for stage in self._stages]
        return torch.stack([part for part in found if part is not None]).sum()

    @override
    def figures(self, batch: Any, task: Views) -> dict[str, np.ndarray]:
        return {
            name: picture
            for stage in self._stages
            for name, picture in stage.figures(batch, task).items()
        }

    @property
    def _stages(self) -> list[Designer]:
        return list(self.stages.values())  # pyright: ignore[reportReturnType]

    @staticmethod
    def _refine(views: Views, batch: Any, stages: list[Designer]) -> Views:
        for stage in stages:
            views = stage.refine(views, batch)
        return views
