import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.differences import assert_gradient_is_that_of_differences
from torch import Generator, Tensor, nn
from torch.func import functional_call

from metavpt.designers.choice import balanced
from metavpt.designers.encoder import ImageEncoder
from metavpt.designers.selection import SelectionDesigner, weigh
from metavpt.designers.views import MultiCrop, Views
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params


def batch(size: int = 5) -> Any:
    return SimpleNamespace(
        images=torch.rand(
            size, 3, 24, 32, dtype=torch.float64, generator=Generator().manual_seed(0)
        ),
        seed=7,
    )


def designer(randomised: bool = False, **changes: Any) -> SelectionDesigner:
    torch.manual_seed(0)
    recipe = MultiCrop(
        (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), global_size=8, local_size=8, num_local=1
    )
    made = SelectionDesigner(recipe, ImageEncoder(width=8, depth=2, size=8), **changes).double()
    if randomised:
        nn.init.normal_(made.head.weight, std=10.0)
    return made


@pytest.mark.parametrize("size", [1, 3, 49, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_new_designer_weighs_all_alike_to_the_last_bit(size: int, dtype: torch.dtype) -> None:
    made = designer().to(dtype)
    given = batch(size)
    given.images = given.images.to(dtype)
    task = made(given)
    assert (task.weights == 1).all()
    assert torch.equal(task.global_crops, made.recipe_task(given).global_crops)
    assert made.recipe_task(given).weights is None
    losses = torch.rand(size, dtype=dtype)
    assert torch.equal(weigh(losses, task.weights).mean(), weigh(losses, None).mean())
    assert made.regularizer(task).item() == 0


def test_weights_are_the_tempered_softmax_times_the_batch() -> None:
    made = designer(randomised=True, temperature=0.5)
    logits = made.head(made.encoder((batch().images - 0.5) / 0.25))[:, 0]
    torch.testing.assert_close(
        made(batch()).weights, 5 * (logits / 0.5).softmax(0), atol=1e-12, rtol=0
    )
    assert made(batch()).weights.std() > 0.1


def test_balanced_weights_have_mean_one_whatever_the_logits() -> None:
    for logits in (torch.tensor([1e4, -1e4, 0.0]), torch.tensor([3.0]), torch.randn(100)):
        weights = balanced(logits)
        assert weights.isfinite().all()
        assert weights.mean().item() == pytest.approx(1.0, abs=1e-6)


def test_the_regularizer_is_the_divergence_from_uniform() -> None:
    made = designer(randomised=True, kl_weight=0.3)
    task = made(batch())
    expected = 0.3 * sum(w / 5 * math.log(w / 5 / (1 / 5)) for w in task.weights.tolist())
    assert made.regularizer(task).item() == pytest.approx(expected, abs=1e-12)
    one = task._replace(weights=torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0], requires_grad=True))
    assert made.regularizer(one).item() == pytest.approx(0.3 * math.log(5), rel=1e-6)
    assert torch.autograd.grad(made.regularizer(one), one.weights)[0].isfinite().all()


def test_every_parameter_is_reached_and_the_gradient_is_that_of_differences() -> None:
    made = designer(randomised=True)
    phi = params.clone(params.named(made))
    losses = torch.rand(5, dtype=torch.float64, generator=Generator().manual_seed(3))

    def total(at: params.Params) -> Tensor:
        task = functional_call(made, at, batch())
        return weigh(losses, task.weights).mean() + made.regularizer(task)

    assert_gradient_is_that_of_differences(total, phi)


def test_a_new_designer_has_a_gradient() -> None:
    made = designer()
    loss = weigh(
        torch.rand(5, dtype=torch.float64, generator=Generator().manual_seed(3)),
        made(batch()).weights,
    ).mean()
    assert torch.autograd.grad(loss, made.head.weight)[0].abs().sum() > 0


def test_random_tasks_are_the_same_views_under_other_weights() -> None:
    made = designer()
    first, second = made.random_tasks(batch(), 2)
    assert torch.equal(first.global_crops, made.recipe_task(batch()).global_crops)
    assert not torch.equal(first.weights, second.weights)
    assert torch.equal(first.weights, made.random_tasks(batch(), 1)[0].weights)
    assert first.weights.mean().item() == pytest.approx(1.0, abs=1e-12)


def test_the_figure_shows_the_heaviest_and_the_lightest_images() -> None:
    made = designer(randomised=True)
    with torch.no_grad():
        picture = made.figures(batch(), made(batch()))["selection"]
    rows, columns = 2, 5
    assert picture.shape == (rows * (24 + 3) + 2, columns * 32 + 2 * (columns - 1), 3)
    assert (
        picture[25, 0, 0] > picture[25, -1, 0]
    )  # the bar of the heaviest is brighter than that of the lightest


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MetaVPTError, match="temperature"):
        designer(temperature=0.0)
    plain: Views = designer().recipe_task(batch())
    with pytest.raises(MetaVPTError, match="no weights"):
        designer().regularizer(plain)
