import pytest
import torch
from helpers.tiny_lm import VOCAB, TinyLanguage, packed, tiny_lm

from metavpt.check.modes import Float64
from metavpt.designers.targets import designer_body
from metavpt.designers.token_weights import TokenWeights
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import OneStep
from metavpt.hypergradients.linear_targets import CentralDifference, LinearProduct
from metavpt.hypergradients.mixed_products import (
    DifferenceProduct,
    ExactProduct,
    value_and_gradient,
)
from metavpt.objectives.prediction import predicted_tokens
from metavpt.objectives.target_task import target_loss, target_loss_per_sample
from metavpt.strategies.learned import inner_loss

BATCH = packed([[5, 7], [9]])


@pytest.fixture(autouse=True)
def float64():
    """transformers computes norms in float32 whatever the model's dtype."""
    with Float64():
        yield


def designer(per="token", moved=0.0, seed=1):
    torch.manual_seed(seed)
    made = TokenWeights(designer_body(VOCAB, width=8, num_layers=2, num_heads=2), per).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(moved * torch.randn_like(p))
    return made


def weights_of(made):
    with torch.no_grad():
        return made(BATCH).targets.weights


@pytest.mark.parametrize("per", ["token", "row"])
def test_a_new_designer_is_the_recipe_bit_for_bit(per):
    learner, made = tiny_lm(), designer(per)
    theta = params.named(learner)
    with torch.no_grad():
        tasks = made.recipe_task(BATCH), made(BATCH)
    plain, own = (
        value_and_gradient(lambda p, t=t: target_loss(learner, p, t), theta) for t in tasks
    )
    assert torch.equal(plain[0], own[0])
    assert all(torch.equal(plain[1][name], own[1][name]) for name in theta)


@pytest.mark.parametrize("per", ["token", "row"])
def test_weights_have_mean_one_over_the_tokens_to_predict(per):
    predicted, weights = predicted_tokens(BATCH), weights_of(designer(per, moved=0.5))
    assert float(weights[predicted].mean()) == pytest.approx(1.0, abs=1e-12)
    assert float(weights[~predicted].abs().sum()) == 0.0
    rows = [weights[b][predicted[b]] for b in range(2)]
    assert float(rows[0].mean() - rows[1].mean()) != 0.0
    assert (max(float(row.max() - row.min()) for row in rows) < 1e-12) == (per == "row")


def test_the_loss_is_the_weighted_mean_of_the_tokens_losses():
    learner, made = tiny_lm(), designer(moved=0.5)
    with torch.no_grad():
        task = made(BATCH)
        log_probs = learner.logits(BATCH).log_softmax(2)
        costs = (
            -log_probs[:, :-1]
            .gather(2, BATCH.tokens[:, 1:, None])
            .squeeze(2)[predicted_tokens(BATCH)[:, 1:]]
        )
        weights = task.targets.weights[predicted_tokens(BATCH)]
        found = target_loss(learner, params.named(learner), task)
        per_row = target_loss_per_sample(learner, params.named(learner), task)({})
    torch.testing.assert_close(found, (weights * costs).mean(), atol=1e-12, rtol=0)
    num = predicted_tokens(BATCH).sum(1)
    torch.testing.assert_close((per_row * num).sum() / num.sum(), found, atol=1e-12, rtol=0)


@pytest.mark.parametrize("per", ["token", "row"])
def test_the_linear_product_is_the_general_one(per):
    """Also with `absolute=False`: weights do not sum to 1 for a token, so none may be dropped."""
    problem = TinyLanguage(designer=designer(per, moved=0.3))
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}

    def hypergradient(product):
        outer = lambda p: problem.feedback_loss({**theta, **p}, packed([[8]], seed=9))
        return OneStep(product=product)(
            [inner_loss(problem, theta, BATCH)], outer, aligned, params.named(problem.designer)
        ).by_phi

    exact = hypergradient(ExactProduct())
    for name, g in exact.items():
        assert float(g.abs().max()) > 0, name
    products = (
        LinearProduct(),
        LinearProduct(CentralDifference(), absolute=False),
        DifferenceProduct(),
    )
    for product, tolerance in zip(products, (1e-12, 1e-7, 1e-7), strict=True):
        difference = params.add(hypergradient(product), exact, alpha=-1.0)
        assert float(params.norm(difference) / params.norm(exact)) < tolerance


def test_random_tasks_are_the_batchs_own():
    made = designer()
    first, again, other = (
        made.random_tasks(BATCH, 2),
        made.random_tasks(BATCH, 2),
        made.random_tasks(BATCH._replace(seed=5), 1),
    )
    assert torch.equal(first[0].targets.weights, again[0].targets.weights)
    assert not torch.equal(first[0].targets.weights, first[1].targets.weights)
    assert not torch.equal(first[0].targets.weights, other[0].targets.weights)


def test_the_regularizer_is_the_divergence_from_uniform():
    made = designer(moved=0.5)
    task = made(BATCH)
    share = task.targets.weights[predicted_tokens(BATCH)] / predicted_tokens(BATCH).sum()
    expected = 0.1 * (share * (share * len(share)).log()).sum()
    torch.testing.assert_close(made.regularizer(task), expected, atol=1e-12, rtol=0)
    with pytest.raises(MetaVPTError, match="has no weights"):
        made.regularizer(made.recipe_task(BATCH))
    with pytest.raises(MetaVPTError, match="per=word"):
        TokenWeights(designer_body(VOCAB, 8, 1, 2), per="word")
