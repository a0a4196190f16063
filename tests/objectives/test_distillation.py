"""The sum of terms against each term's own function, which is tested against its paper."""

import pytest
import torch
from torch import Generator, Tensor

from metavpt.errors import MetaVPTError
from metavpt.objectives.dino import dino_loss
from metavpt.objectives.distillation import (
    active_terms,
    hidden_patch_loss,
    pack,
    term_losses,
    unpack,
)
from metavpt.objectives.gram import gram_loss
from metavpt.objectives.ibot import ibot_loss
from metavpt.objectives.koleo import koleo_loss

V, B, N, K, D = 4, 3, 6, 7, 5


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=Generator().manual_seed(seed))


def scene() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Outputs, goals and what is hidden: of one image nothing, in either view."""
    hidden = draw(2, B, N, seed=0) > 0.3
    hidden[:, 1] = False
    hidden[0, 0], hidden[1, 0] = True, False
    num_hidden = int(hidden.sum())
    outputs = {
        "dino": draw(V, B, K, seed=1), "ibot": draw(num_hidden, K, seed=2),
        "koleo": draw(2, B, D, seed=3), "gram": draw(2, B, N, D, seed=4)
    }  # fmt: skip
    goals = {
        "dino": draw(2, B, K, seed=5).softmax(-1), "ibot": draw(num_hidden, K, seed=6).softmax(-1),
        "gram": draw(2, B, N, 8, seed=7)
    }  # fmt: skip
    return outputs, goals, hidden


def test_each_term_is_its_own_function_over_the_two_global_views() -> None:
    """Meaned over the views, but for KoLeo, which DINOv2 and DINOv3 sum."""
    outputs, goals, hidden = scene()
    losses = term_losses(outputs, goals, hidden, temperature=0.3)
    logits, probs = (torch.zeros(2, B, N, K, dtype=torch.float64) for _ in range(2))
    logits[hidden], probs[hidden] = outputs["ibot"], goals["ibot"]
    expected = {
        "dino": dino_loss(list(outputs["dino"]), goals["dino"], 0.3, "none"),
        "ibot": sum(ibot_loss(logits[v], probs[v], hidden[v], 0.3, "none") for v in range(2)) / 2,
        "koleo": sum(koleo_loss(outputs["koleo"][v], reduction="none") for v in range(2)),
        "gram": sum(gram_loss(outputs["gram"][v], goals["gram"][v], "none") for v in range(2)) / 2,
    }
    assert losses.shape == (4, B)
    for loss, name in zip(losses, expected, strict=True):
        torch.testing.assert_close(loss, expected[name], atol=1e-12, rtol=0, msg=name)
    assert losses[1, 1] == 0


@pytest.mark.parametrize("name", ["dino", "ibot", "koleo", "gram"])
def test_a_term_alone_is_what_it_is_among_others(name: str) -> None:
    outputs, goals, hidden = scene()
    alone = term_losses({name: outputs[name]}, goals, hidden)
    assert torch.equal(alone[0], term_losses(outputs, goals, hidden)[list(outputs).index(name)])


def test_a_batch_that_hides_nothing_has_a_patch_loss_of_zero_and_a_gradient() -> None:
    logits = torch.empty(0, K, dtype=torch.float64, requires_grad=True)
    loss = hidden_patch_loss(
        logits, torch.empty(0, K, dtype=torch.float64), torch.zeros(2, B, N, dtype=torch.bool), 0.1
    )
    assert torch.equal(loss, torch.zeros(B, dtype=torch.float64))
    assert torch.autograd.grad(loss.sum(), logits)[0].shape == (0, K)


def test_unpack_undoes_pack() -> None:
    outputs = scene()[0]
    packed = pack(outputs)
    assert packed.ndim == 1
    again = unpack(packed, {name: output.shape for name, output in outputs.items()})
    assert list(again) == list(outputs)
    assert all(torch.equal(again[name], outputs[name]) for name in outputs)


def test_active_terms_are_those_with_a_weight_in_one_order() -> None:
    assert active_terms({"gram": 2, "koleo": 0.0, "dino": 1.0}) == {"dino": 1.0, "gram": 2.0}
    assert list(active_terms({"gram": 2, "dino": 1.0})) == ["dino", "gram"]


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"byol": 1.0}, "'byol'; known are dino"),
        ({"dino": -1.0}, "negative"),
        ({"dino": 0.0}, "one must be positive"),
    ],
)
def test_terms_that_are_no_recipe_are_refused(terms: dict[str, float], words: str) -> None:
    with pytest.raises(MetaVPTError, match=words):
        active_terms(terms)


def test_hidden_patches_that_are_missing_are_named() -> None:
    outputs, goals, _ = scene()
    with pytest.raises(MetaVPTError, match=r"problem.terms.ibot"):
        term_losses({"ibot": outputs["ibot"]}, goals, None)
