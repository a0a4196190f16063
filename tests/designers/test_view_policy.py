"""The policy of views: which patches, or features of patches, count in the term `features`."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from metavpt import MetaVPTError
from metavpt.data.loader import Batch
from metavpt.designers.view_policy import ViewPolicy
from metavpt.designers.views import MultiCrop
from metavpt.hypergradients import params

IMAGES = torch.randint(
    0, 256, (3, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
BATCH = Batch(IMAGES, seed=5)
NUM_PATCHES, WIDTH, NUM_OUTPUTS = 16, 6, 2
Surface = Literal["patches", "features"]
surfaces = pytest.mark.parametrize("surface", ["patches", "features"])


def designer(surface: Surface = "features", std: float = 0.5, strength: float = 1.0) -> ViewPolicy:
    """In float64; `std` moves it away from the recipe."""
    torch.manual_seed(0)
    recipe = MultiCrop((0.5,) * 3, (0.2,) * 3, 16, 8, num_local=1, patch_size=4, hidden_prob=1.0)
    made = ViewPolicy(recipe, surface, strength, hidden_width=8)
    made.build(WIDTH, patch_size=4, num_outputs=NUM_OUTPUTS)
    torch.nn.init.normal_(made.network.write.weight, std=std)
    torch.nn.init.normal_(made.network.position, std=std)
    torch.nn.init.normal_(made.directions)
    return made.double()


def step() -> tuple[Tensor, Tensor, Tensor]:
    """Residual, states and features, (2, 3, N, D) each."""
    g = torch.Generator().manual_seed(1)
    drawn = torch.randn(3, 2, 3, NUM_PATCHES, WIDTH, dtype=torch.float64, generator=g)
    return drawn[0], drawn[1], drawn[2]


@surfaces
def test_an_untrained_policy_is_the_recipe_bit_for_bit(surface: Surface) -> None:
    made = designer(surface, std=0.0)
    task, recipe = made(BATCH), made.recipe_task(BATCH)
    weights = made.weights(task, *step())
    assert weights is not None
    assert torch.equal(weights, torch.ones_like(weights))
    assert made.weights(recipe, *step()) is None
    assert task.hidden is not None
    assert recipe.hidden is not None
    assert torch.equal(task.global_crops, recipe.global_crops)
    assert torch.equal(task.local_crops, recipe.local_crops)
    assert torch.equal(task.hidden, recipe.hidden)


@surfaces
def test_weights_follow_the_predicted_residuals_along_the_directions_of_the_heads(
    surface: Surface,
) -> None:
    """(1 + strength score / |score|)_+ over their mean, with scores (t - s) sum_c e_c w_c."""
    made = designer(surface, strength=2.0)
    residual, states, features = step()
    weights = made.weights(made(BATCH), residual, states, features)
    assert weights is not None
    expected = torch.zeros_like(residual)
    for v in range(2):
        outputs = made.network(states[v], features[v], (4, 4))
        for c in range(NUM_OUTPUTS):
            expected[v] += residual[v] * outputs[..., c, None] * made.directions[c]
    if surface == "patches":
        expected = expected.mean(dim=-1, keepdim=True)
    expected = (1 + 2 * expected / (expected.square().mean() + 1e-6).sqrt()).clamp_min(0)
    assert (expected == 0).any()
    torch.testing.assert_close(weights, expected / expected.mean())


@surfaces
def test_gradient_of_the_value_of_a_policy_is_that_of_finite_differences(surface: Surface) -> None:
    made = designer(surface, strength=0.05)  # no weight is 0, where there is a kink
    seen, squares = step(), step()[0].square()

    def value() -> Tensor:
        weights = made.weights(made(BATCH), *seen)
        assert weights is not None
        return (weights * squares).mean()

    named = params.named(made)
    gradient = torch.autograd.grad(value(), list(named.values()))
    g = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, dtype=p.dtype, generator=g) for p in named.values()]
    slope = sum(float((a * b).sum()) for a, b in zip(gradient, direction, strict=True))
    made_values = []
    for sign in (1, -2):  # ahead, then behind
        with torch.no_grad():
            for p, d in zip(named.values(), direction, strict=True):
                p += sign * 1e-5 * d
        made_values.append(float(value().detach()))
    assert slope != 0
    assert (made_values[0] - made_values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


def test_a_task_made_without_a_graph_does_not_follow_phi() -> None:
    made = designer()
    with torch.no_grad():
        task = made(BATCH)
        before = made.weights(task, *step())
        made.network.write.weight += 1.0
        made.directions += 1.0
        after = made.weights(task, *step())
    assert task.phi is not None
    assert not any(p.requires_grad for p in task.phi.values())
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)


@surfaces
def test_random_and_hardest_policies_ignore_the_network(surface: Surface) -> None:
    made = designer(surface)
    residual, states, features = step()
    width = WIDTH if surface == "features" else 1
    random, again = made.random_tasks(BATCH, 1)[0], made.random_tasks(BATCH, 1)[0]
    assert random.phi is None
    assert random.feature_scores is not None
    assert again.feature_scores is not None
    assert random.feature_scores.shape == (2, 3, NUM_PATCHES, width)
    assert torch.equal(random.feature_scores, again.feature_scores)
    hardest = made.weights(made.hardest_task(BATCH), residual, states, features)
    squares = residual.square()
    squares = squares if surface == "features" else squares.mean(dim=-1, keepdim=True)
    expected = 1 + squares / squares.square().mean().sqrt()
    assert hardest is not None
    torch.testing.assert_close(hardest, expected / expected.mean(), rtol=1e-5, atol=1e-5)


def test_loss_is_the_error_over_labelled_outputs_alone() -> None:
    made = designer()
    _, states, features = step()
    g = torch.Generator().manual_seed(3)
    values, share = torch.rand(2, 3, NUM_PATCHES, NUM_OUTPUTS, dtype=torch.float64, generator=g)
    share[:, :5] = 0
    lesson = {
        "states": states[0],
        "features": features[0],
        "values": values,
        "share": share,
        "grid": torch.tensor([[4, 4]] * 3),
    }
    error = made.network(states[0], features[0], (4, 4)) - values
    expected = (share * error.square()).sum() / share.sum()
    assert float(made.loss(lesson)) == pytest.approx(float(expected))
    lesson["values"] = torch.where(share == 0, 100.0, values)
    assert float(made.loss(lesson)) == pytest.approx(float(expected))


def test_picture_shows_hidden_patches_and_the_weight_of_each() -> None:
    made = designer().float()
    task = made.recipe_task(BATCH)
    plain = made.figures(BATCH, task)["views"]
    weights = torch.ones(2, 3, NUM_PATCHES, 1)
    weights[0, 0, 0] = 2.0
    changed = made.figures(BATCH, task, weights)["views"]
    rows, columns = (plain != changed).any(axis=-1).nonzero()
    assert len(rows) == 16  # one patch of 4x4 pixels
    assert int(columns.min()) > 2 * 16
    assert plain.dtype.name == "uint8"


def test_wrong_options_are_named() -> None:
    recipe = MultiCrop((0.5,) * 3, (0.2,) * 3, 16, 8, patch_size=4)
    with pytest.raises(MetaVPTError, match=r"designer\.strength=-1"):
        ViewPolicy(recipe, strength=-1)
    with pytest.raises(MetaVPTError, match=r"designer\.surface=masks"):
        ViewPolicy(recipe, surface="masks")  # type: ignore[arg-type]
    with pytest.raises(MetaVPTError, match="feedback=cross_fitted"):
        ViewPolicy(recipe).build(WIDTH, patch_size=4, num_outputs=0)
