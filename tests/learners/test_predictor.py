import pytest
import torch

from metavpt.errors import MetaVPTError
from metavpt.learners.predictor import MaskedLearner, Predictor
from metavpt.learners.vit import create_backbone

GRID = (3, 4)


def predictor() -> Predictor:
    torch.manual_seed(0)
    return Predictor(width_in=10, width_out=5, width=16, depth=2, num_heads=2).double()


def question() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    visible = torch.tensor([[0, 5, 7], [11, 2, 3]])
    targets = torch.tensor([[[1, 2], [4, 6]], [[0, 1], [1, 10]]])
    return torch.randn(2, 3, 10, dtype=torch.float64), visible, targets


def test_groups_are_predicted_apart() -> None:
    model, (tokens, visible, targets) = predictor(), question()
    together = model(tokens, visible, targets, GRID)
    assert together.shape == (2, 2, 2, 5)
    for m in range(2):
        torch.testing.assert_close(
            together[:, m],
            model(tokens, visible, targets[:, m : m + 1], GRID)[:, 0],
            atol=1e-12,
            rtol=0,
        )


def test_what_counts_is_the_place_and_not_the_order() -> None:
    model, (tokens, visible, targets) = predictor(), question()
    predictions = model(tokens, visible, targets, GRID)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        model(tokens[:, order], visible[:, order], targets.flip(2), GRID),
        predictions.flip(2),
        atol=1e-12,
        rtol=0,
    )
    assert not torch.allclose(
        model(tokens, visible[:, order], targets, GRID), predictions, atol=1e-6
    )
    assert not torch.allclose(
        model(tokens, visible, (targets + 1) % 12, GRID), predictions, atol=1e-6
    )


def test_every_parameter_is_used() -> None:
    model, asked = predictor(), question()
    gradients = torch.autograd.grad(model(*asked, GRID).square().sum(), list(model.parameters()))
    zero = [
        name
        for (name, _), g in zip(model.named_parameters(), gradients, strict=True)
        if not g.any()
    ]
    assert zero == []


def test_learner_predicts_from_the_encoder_on_the_visible_patches() -> None:
    torch.manual_seed(0)
    backbone = create_backbone(
        "vit_tiny_dinov3", 1, embed_dim=16, depth=2, num_heads=2, init_values=1.0
    )
    learner = MaskedLearner(backbone, Predictor(16, 5, 16, 1, 2)).double()
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    _, visible, targets = question()
    assert learner.grid(images) == GRID
    features = backbone.tail(backbone.trunk(images, visible)).patches[:, :, 0].transpose(1, 2)
    assert torch.equal(
        learner(images, visible, targets), learner.predictor(features, visible, targets, GRID)
    )
    changed = images.clone()
    changed[:, :, 8:16, 16:24] += 1.0  # patch 6, which neither image shows
    assert torch.equal(learner(changed, visible, targets), learner(images, visible, targets))


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(MetaVPTError, match="width=18"):
        Predictor(8, 8, width=18, num_heads=3)
