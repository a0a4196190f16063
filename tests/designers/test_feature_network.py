import pytest
import torch
import torch.nn.functional as F

from metavpt.data.loader import Batch
from metavpt.designers.crop import RandomCrop
from metavpt.designers.feature_network import FeatureNetwork

IMAGES = torch.randint(
    0, 256, (3, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
BATCH = Batch(IMAGES, seed=5)


def designer(std=0.3, **options):
    """float64 but for its images, away from where it starts by `std`."""
    torch.manual_seed(0)
    made = FeatureNetwork(
        RandomCrop((0.5,) * 3, (0.2,) * 3, size=16),
        patch_size=4,
        width=12,
        hidden_width=8,
        **options,
    ).double()
    for parameter in made.network.write.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return made


def described(num=3, seed=1):
    """states, features: (num, 16, 12) each."""
    return torch.randn(
        2, num, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).unbind()


def test_moves_are_those_written_out_patch_by_patch():
    made = designer(gate=0.7)
    (states, features), task = described(), made(BATCH)
    found = made.moves(task._replace(gate=task.gate.double()), states, features)
    network = made.network
    seen = torch.cat(
        [
            (states - states.mean(-1, keepdim=True))
            / (states.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(),
            features,
        ],
        -1,
    )
    hidden = F.gelu(seen @ network.read.weight[:, :, 0, 0].T + network.read.bias)
    for b, row, column in [(0, 0, 0), (1, 2, 1), (2, 3, 3)]:
        mixed = network.mix.bias.clone()
        for i in (-1, 0, 1):
            for j in (-1, 0, 1):
                if 0 <= row + i < 4 and 0 <= column + j < 4:
                    mixed = (
                        mixed
                        + network.mix.weight[:, :, i + 1, j + 1]
                        @ hidden[b, 4 * (row + i) + column + j]
                    )
        own = hidden[b, 4 * row + column] + F.gelu(mixed)
        expected = 0.7 * (network.write.weight[:, :, 0, 0] @ own + network.write.bias)
        torch.testing.assert_close(
            found[b, 4 * row + column], expected, rtol=1e-6, atol=1e-8
        )  # the gate was made in float32


def test_an_untrained_designer_moves_nothing_and_makes_the_recipes_views():
    made = FeatureNetwork(RandomCrop((0.5,) * 3, (0.2,) * 3, size=16), patch_size=4, width=12)
    task, recipe = made(BATCH), made.recipe_task(BATCH)
    states, features = (part.float() for part in described())
    assert not made.moves(task, states, features).any()
    assert not recipe.phi
    for own, plain in zip(task[:5], recipe[:5], strict=True):
        assert torch.equal(own, plain)


def test_a_detached_task_does_not_follow_phi_and_asks_for_no_gradient():
    made = designer()
    with torch.no_grad():
        task = made(BATCH)
        before = made.moves(task, *described())
        made.network.read.weight.add_(1.0)
        assert torch.equal(made.moves(task, *described()), before)
    assert not any(p.requires_grad for p in task.phi.values())
    assert all(p.requires_grad for p in made(BATCH).phi.values())


@pytest.mark.parametrize("name", ["read", "mix", "write"])
def test_the_loss_is_minus_value_with_a_trust_region_and_its_gradient_is_finite_differences(name):
    """In float64, to a relative 1e-6, along the weight of each layer."""
    made = designer()
    states, features = described()
    values = torch.randn(3, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    lesson = {
        "states": states,
        "features": features,
        "values": values,
        "grid": torch.tensor([[4, 4]] * 3),
    }
    y = made.network(states, features, (4, 4)).detach()
    assert float(made.loss(lesson).detach()) == pytest.approx(
        float(-(y * values).mean() + (y * y).mean() / 2), rel=1e-12
    )
    weight = getattr(made.network, name).weight
    (gradient,) = torch.autograd.grad(made.loss(lesson), weight)
    direction, step = (
        torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
        1e-5,
    )
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight.add_(sign * step * direction)
            ends.append(float(made.loss(lesson)))
            weight.add_(-sign * step * direction)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(
        float((gradient * direction).sum()), rel=1e-6
    )
