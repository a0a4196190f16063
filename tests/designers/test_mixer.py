import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.differences import assert_gradient_is_that_of_differences
from torch import Generator, Tensor, nn
from torch.func import functional_call

from metavpt.designers.chain import Chain
from metavpt.designers.encoder import ImageEncoder
from metavpt.designers.mixer import MixDesigner, mix_terms
from metavpt.designers.selection import SelectionDesigner
from metavpt.designers.views import MultiCrop
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params

TERMS = {"dino": 1.0, "ibot": 1.0, "koleo": 0.1, "gram": 0.0}


def batch(size: int = 5) -> Any:
    return SimpleNamespace(
        images=torch.rand(
            size, 3, 24, 32, dtype=torch.float64, generator=Generator().manual_seed(0)
        ),
        seed=7,
    )


def recipe() -> MultiCrop:
    return MultiCrop((0.5,) * 3, (0.25,) * 3, global_size=8, local_size=8, num_local=1)


def designer(per_image: bool = True, randomised: bool = False, **changes: Any) -> MixDesigner:
    torch.manual_seed(0)
    encoder = ImageEncoder(width=8, depth=2, size=8) if per_image else None
    made = MixDesigner(recipe(), **({"terms": TERMS, "encoder": encoder} | changes)).double()
    if randomised:
        nn.init.normal_(made.logits)
        if made.head is not None:
            nn.init.normal_(made.head.weight, std=10.0)
    return made


def losses(size: int = 5) -> Tensor:
    return torch.rand(3, size, dtype=torch.float64, generator=Generator().manual_seed(3))


@pytest.mark.parametrize(
    "terms",
    [TERMS, {"dino": 0.7, "ibot": 0.3}, {"dino": 1 / 3, "ibot": 0.1, "koleo": 0.07, "gram": 2.3}],
)
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_new_designer_mixes_as_the_recipe_to_the_last_bit(
    terms: dict[str, float], per_image: bool, dtype: torch.dtype
) -> None:
    made = designer(per_image, terms=terms).to(dtype)
    weights = [weight for weight in terms.values() if weight]
    for size in (1, 3, 49, 64):
        given = batch(size)
        given.images = given.images.to(dtype)
        task = made(given)
        assert torch.equal(task.mix, torch.tensor(weights, dtype=dtype)[:, None].expand(-1, size))
        assert torch.equal(task.global_crops, made.recipe_task(given).global_crops)
        of_terms = torch.rand(len(weights), size, dtype=dtype)
        assert torch.equal(
            mix_terms(of_terms, weights, task.mix), mix_terms(of_terms, weights, None)
        )
    assert made.recipe_task(given).mix is None
    assert made.regularizer(task).item() == pytest.approx(0.0, abs=1e-7)


def test_weights_are_the_formula_and_keep_their_sum() -> None:
    made = designer(randomised=True)
    mix = made(batch()).mix
    logits = made.logits + made.head(made.encoder((batch().images - 0.5) / 0.25))
    for b in range(5):
        odds = [p * math.exp(x) for p, x in zip((1.0, 1.0, 0.1), logits[b].tolist(), strict=True)]
        torch.testing.assert_close(
            mix[:, b],
            torch.tensor([2.1 * o / sum(odds) for o in odds], dtype=torch.float64),
            atol=1e-12,
            rtol=0,
        )
    assert mix.std(dim=1).min() > 1e-4
    torch.testing.assert_close(
        designer(False, True)(batch()).mix.std(dim=1),
        torch.zeros(3, dtype=torch.float64),
        atol=1e-12,
        rtol=0,
    )


def test_the_loss_is_the_weighted_sum_of_the_terms() -> None:
    mix = designer(randomised=True)(batch()).mix.detach()
    expected = [
        sum(float(w * loss) for w, loss in zip(mix[:, b], losses()[:, b], strict=True))
        for b in range(5)
    ]
    torch.testing.assert_close(
        mix_terms(losses(), TERMS.values(), mix), torch.tensor(expected, dtype=torch.float64)
    )
    plain = mix_terms(losses(), [1.0, 1.0, 0.1], None)
    torch.testing.assert_close(
        plain, losses()[0] + losses()[1] + 0.1 * losses()[2], atol=1e-14, rtol=0
    )


def test_the_regularizer_is_the_divergence_from_the_recipe() -> None:
    made = designer(randomised=True, kl_weight=0.3)
    task = made(batch())
    p = [1 / 2.1, 1 / 2.1, 0.1 / 2.1]
    kl = [
        sum(
            w / 2.1 * math.log(w / 2.1 / q) for w, q in zip(task.mix[:, b].tolist(), p, strict=True)
        )
        for b in range(5)
    ]
    assert made.regularizer(task).item() == pytest.approx(0.3 * sum(kl) / 5, abs=1e-12)
    edge = task._replace(
        mix=torch.tensor([[2.1], [0.0], [0.0]], dtype=torch.float64, requires_grad=True)
    )
    assert made.regularizer(edge).item() == pytest.approx(0.3 * math.log(2.1), abs=1e-9)
    assert torch.autograd.grad(made.regularizer(edge), edge.mix)[0].isfinite().all()


@pytest.mark.parametrize("per_image", [True, False])
def test_every_parameter_is_reached_and_the_gradient_is_that_of_differences(
    per_image: bool,
) -> None:
    made = designer(per_image, randomised=True)
    phi = params.clone(params.named(made))

    def total(at: params.Params) -> Tensor:
        task = functional_call(made, at, batch())
        return mix_terms(losses(), TERMS.values(), task.mix).mean() + made.regularizer(task)

    assert_gradient_is_that_of_differences(total, phi)


def test_a_new_designer_has_a_gradient() -> None:
    made = designer()
    loss = mix_terms(losses(), TERMS.values(), made(batch()).mix).mean()
    assert all(
        grad.abs().sum() > 0 for grad in torch.autograd.grad(loss, [made.logits, made.head.weight])
    )


def test_random_tasks_are_the_same_views_under_other_mixes() -> None:
    made = designer()
    first, second = made.random_tasks(batch(), 2)
    assert torch.equal(first.global_crops, made.recipe_task(batch()).global_crops)
    assert not torch.equal(first.mix, second.mix)
    assert torch.equal(first.mix, made.random_tasks(batch(), 1)[0].mix)
    torch.testing.assert_close(
        first.mix.sum(dim=0), torch.full((5,), 2.1, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_it_stands_in_a_chain_with_others() -> None:
    torch.manual_seed(0)
    stages = {
        "mix": lambda r: MixDesigner(r, TERMS, ImageEncoder(width=8, depth=2, size=8)),
        "selection": lambda r: SelectionDesigner(r, ImageEncoder(width=8, depth=2, size=8)),
    }
    made = Chain(recipe(), stages).double()
    task = made(batch())
    assert task.mix.shape == (3, 5)
    assert task.weights.shape == (5,)
    with torch.no_grad():
        assert made.figures(batch(), task).keys() == {"mix", "selection"}


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MetaVPTError, match="nothing to mix"):
        designer(terms={"dino": 1.0, "ibot": 0.0})
    with pytest.raises(MetaVPTError, match="no mix"):
        designer().regularizer(designer().recipe_task(batch()))
    with pytest.raises(MetaVPTError, match="3 weights for 2 terms"):
        mix_terms(losses()[:2], [1.0, 1.0], designer()(batch()).mix)
