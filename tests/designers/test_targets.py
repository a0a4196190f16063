import pytest
import torch
from helpers.tiny_lm import VOCAB, TinyLanguage, packed, tiny_designer, tiny_lm

from metavpt.check.modes import Float64
from metavpt.designers.targets import TargetDesigner, designer_body
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import OneStep
from metavpt.hypergradients.linear_targets import LinearProduct
from metavpt.hypergradients.mixed_products import value_and_gradient
from metavpt.learners.pretrained_lm import random_language_model
from metavpt.objectives.target_task import target_loss
from metavpt.strategies.learned import inner_loss

BATCH = packed([[5, 7], [9]])


@pytest.fixture(autouse=True)
def float64():
    """transformers computes norms in float32 whatever the model's dtype."""
    with Float64():
        yield


def task_of(designer, batch=BATCH):
    with torch.no_grad():
        return designer(batch)


def hypergradient(problem):
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    outer = lambda p: problem.feedback_loss({**theta, **p}, packed([[8]], seed=9))
    return OneStep(product=LinearProduct())(
        [inner_loss(problem, theta, BATCH)], outer, aligned, params.named(problem.designer)
    ).by_phi


def test_a_new_designer_is_the_recipe_bit_for_bit():
    learner, designer = tiny_lm(), tiny_designer()
    theta = params.named(learner)
    plain, own = (
        value_and_gradient(lambda p, t=t: target_loss(learner, p, t), theta)
        for t in (designer.recipe_task(BATCH), task_of(designer))
    )
    assert torch.equal(plain[0], own[0])
    assert all(torch.equal(plain[1][name], own[1][name]) for name in theta)


def test_a_new_designer_has_a_gradient_to_open_its_gates_and_an_open_one_in_everything():
    new = hypergradient(TinyLanguage())
    assert float(new["gate.bias"].abs()) > 0
    assert float(new["gate.weight"].abs().min()) > 0
    moved = hypergradient(TinyLanguage(designer=tiny_designer(moved=0.3)))
    for name, g in moved.items():
        assert float(g.abs().max()) > 0, name


def test_gates_lie_in_their_range_and_the_regularizer_pulls_what_is_outside():
    designer = tiny_designer(moved=0.3)
    with torch.no_grad():
        designer.gate.weight.mul_(30)
    task = designer(BATCH)
    gate = task.targets.gate
    logits = designer.gate(designer.body(BATCH)).squeeze(2)
    torch.testing.assert_close(gate, 0.5 * logits.clamp(0, 1))
    assert (logits < 0).any()
    assert (logits > 1).any()
    expected = 0.1 * ((logits - 1).clamp(min=0) + (-logits).clamp(min=0)).mean()
    torch.testing.assert_close(designer.regularizer(task), expected)
    (by_bias,) = torch.autograd.grad(designer.regularizer(task), designer.gate.bias)
    assert float(by_bias) == pytest.approx(
        0.1 * float((logits > 1).double().mean() - (logits < 0).double().mean())
    )


def test_a_gate_at_either_edge_passes_the_gradient():
    for bias in (0.0, 1.0):
        designer = tiny_designer()
        with torch.no_grad():
            designer.gate.bias.fill_(bias)
        (by_bias,) = torch.autograd.grad(designer(BATCH).targets.gate.sum(), designer.gate.bias)
        assert float(by_bias) == pytest.approx(0.5 * BATCH.tokens.numel())


def test_what_is_said_of_a_token_depends_on_it_and_its_context_alone():
    designer = tiny_designer(moved=0.3)
    vectors = task_of(designer).targets.vectors
    tokens = BATCH.tokens.clone()
    tokens[0, 3] = (tokens[0, 3] + 1) % VOCAB
    changed = (
        task_of(designer, BATCH._replace(tokens=tokens)).targets.vectors - vectors
    ).abs().amax(dim=2)[0] > 1e-9
    assert (
        changed.tolist() == [False] * 3 + [True] * 2 + [False] * 7
    )  # the second document begins at 5


def test_a_task_for_the_learner_holds_no_graph_and_leaves_no_gradient_in_the_designer():
    learner, designer = tiny_lm(), tiny_designer(moved=0.3)
    task = task_of(designer)
    assert not task.targets.requires_grad
    target_loss(learner, params.named(learner), task).backward()
    assert all(p.grad is None for p in designer.parameters())
    assert all(p.grad is not None for p in learner.parameters())


def test_a_task_with_a_graph_brings_the_loss_gradient_to_the_designer():
    learner, designer = tiny_lm(), tiny_designer(moved=0.3)
    loss = target_loss(learner, params.named(learner), designer(BATCH))
    assert torch.equal(loss, target_loss(learner, params.named(learner), task_of(designer)))
    loss.backward()
    assert all(p.grad is not None for p in designer.parameters())


def test_the_papers_size():
    designer = TargetDesigner(designer_body(1000))
    config = designer.body.transformers_model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (6, 256, 4)
    assert (designer.num_candidates, designer.max_gate) == (64, 0.5)


def test_bad_arguments_are_named():
    body = designer_body(VOCAB, width=8, num_layers=1, num_heads=2)
    with pytest.raises(MetaVPTError, match="num_candidates=41: choose from 2 to 40"):
        TargetDesigner(body, num_candidates=41)
    with pytest.raises(MetaVPTError, match="max_gate=0"):
        TargetDesigner(body, num_candidates=4, max_gate=0)
    untied = random_language_model(
        "llama", 1, vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(MetaVPTError, match="tie_word_embeddings"):
        TargetDesigner(untied, num_candidates=4)
    with pytest.raises(MetaVPTError, match="has no gates"):
        tiny_designer().regularizer(tiny_designer().recipe_task(BATCH))
