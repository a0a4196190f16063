from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, nn

from metavpt.designers.chain import Chain
from metavpt.designers.encoder import ImageEncoder
from metavpt.designers.masks import MaskDesigner, UNet
from metavpt.designers.policy import PolicyDesigner
from metavpt.designers.selection import SelectionDesigner
from metavpt.designers.views import MultiCrop
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params

STAGES = {
    "policy": lambda recipe: PolicyDesigner(recipe, ImageEncoder(width=8, depth=2, size=8)),
    "mask": lambda recipe: MaskDesigner(recipe, UNet(base=4, depth=1), blur_sigma=2.0),
    "selection": lambda recipe: SelectionDesigner(recipe, ImageEncoder(width=8, depth=2, size=8)),
}


def batch(size: int = 3) -> Any:
    return SimpleNamespace(
        images=torch.rand(size, 3, 24, 32, generator=Generator().manual_seed(0)), seed=7
    )


def chain(*names: str) -> Chain:
    torch.manual_seed(0)
    recipe = MultiCrop(
        (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), global_size=16, local_size=8, num_local=2
    )
    return Chain(recipe, {name: STAGES[name] for name in names})


def disturbed(made: Chain) -> Chain:
    generator = Generator().manual_seed(1)
    for parameter in made.parameters():
        with torch.no_grad():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def test_a_new_chain_is_the_recipe_bit_for_bit() -> None:
    made = chain("policy", "mask", "selection")
    task, plain = made(batch()), made.recipe_task(batch())
    assert torch.equal(task.global_crops, plain.global_crops)
    assert torch.equal(task.local_crops, plain.local_crops)
    assert (task.weights == 1).all()
    assert (task.masks == 1).all()
    assert (task.policy == 0).all()


def test_masks_are_laid_over_the_views_of_the_policy() -> None:
    made = disturbed(chain("policy", "mask"))
    policy, mask = made.stages["policy"], made.stages["mask"]
    task, views = made(batch()), policy(batch())
    assert torch.equal(task.policy, views.policy)
    assert torch.equal(task.local_crops, views.local_crops)
    assert torch.equal(task.global_crops, mask.refine(views, batch()).global_crops)
    assert not torch.equal(task.global_crops, views.global_crops)
    assert not torch.equal(views.global_crops, made.recipe_task(batch()).global_crops)


def test_the_regularizer_is_the_sum_and_figures_are_those_of_all_stages() -> None:
    made = disturbed(chain("policy", "mask", "selection"))
    task = made(batch())
    parts = [stage.regularizer(task) for stage in made.stages.values()]
    torch.testing.assert_close(made.regularizer(task), parts[0] + parts[1] + parts[2])
    assert min(part.item() for part in parts) > 0
    with torch.no_grad():
        assert made.figures(batch(), task).keys() == {"policy", "masks", "selection"}


def test_every_stage_is_reached() -> None:
    made = disturbed(chain("policy", "mask", "selection"))
    task = made(batch())
    total = (task.global_crops.sin().mean(dim=(0, 2, 3, 4)) * task.weights).sum()
    grads = torch.autograd.grad(total, list(params.named(made).values()))
    assert all(grad.isfinite().all() for grad in grads)
    assert (
        sum(bool(grad.any()) for grad in grads) >= len(grads) - 2
    )  # biases right before a norm may play no part


def test_random_tasks_are_random_in_every_stage() -> None:
    made = chain("policy", "mask", "selection")
    first, second = made.random_tasks(batch(), 2)
    for name in ("global_crops", "masks", "policy", "weights"):
        assert not torch.equal(getattr(first, name), getattr(second, name))
    again = made.random_tasks(batch(), 1)[0]
    assert torch.equal(first.global_crops, again.global_crops)
    assert torch.equal(first.weights, again.weights)


def test_orders_that_make_no_sense_are_refused() -> None:
    with pytest.raises(MetaVPTError, match="first of designer"):
        chain("mask", "policy")(batch())
    with pytest.raises(MetaVPTError, match="stages is empty"):
        Chain(MultiCrop((0.5,) * 3, (0.25,) * 3), {})


def test_the_recipe_holds_no_parameter() -> None:
    made = chain("policy", "mask")
    assert isinstance(made.recipe, nn.Module)
    assert {name.split(".")[0] for name in params.named(made)} == {"stages"}
