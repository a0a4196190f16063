"""Feedback from all examples at once: by microbatches, on kept trunk states, renewed by drift."""

import json

import pytest
import torch
from helpers.small_language import composed, fresh_problems, in_float64
from helpers.training import assert_identical, train, weights
from hydra.utils import instantiate
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import downstream
from metavpt.objectives.target_task import OneHot, TargetTask, target_loss
from metavpt.strategies.learned import feedback_on

ALL = ["problem.feedback_batch_size=null", "problem.probe_batch_size=2"]  # 6 examples
FROZEN = "learner.frozen_layers=1"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    with fresh_problems(tmp_path_factory) as fresh:
        yield fresh


@pytest.fixture
def exact_norms(monkeypatch):
    """Normalise in the dtype of the states: transformers does in float32."""
    norm = lambda self, x: torch.nn.functional.rms_norm(
        x, x.shape[-1:], self.weight, self.variance_epsilon
    )
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


def labelled_of(problem):
    return next(iter(problem.feedback_batches(0)))


def gradient(loss, theta, names):
    leaves = {**theta, **params.leaves({name: theta[name] for name in names})}
    found = torch.autograd.grad(loss(leaves), [leaves[name] for name in names])
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("every_layer", [False, True], ids=["tail", "every layer"])
def test_g_down_of_microbatches_is_the_gradient_of_the_mean_over_all_answers(
    make, exact_norms, every_layer
):
    problem = in_float64(make(*ALL, *([] if every_layer else [FROZEN])))
    labelled = labelled_of(problem)
    assert len(labelled["math"].tokens) == 6
    theta = params.detach(params.named(problem.learner))
    names = list(theta) if every_layer else list(problem.aligned_parameters())
    whole = gradient(
        lambda own: target_loss(problem.learner, own, TargetTask(labelled["math"], OneHot())),
        theta,
        names,
    )
    found = gradient(lambda own: problem.feedback_loss(own, labelled), theta, names)
    error = params.norm(params.add(found, whole, alpha=-1.0)) / params.norm(whole)
    assert float(error) < 1e-12
    assert -1 <= problem.feedback_record["g_down_agreement"] <= 1


def test_answers_of_one_kind_agree_and_the_agreement_is_the_cosine_of_the_halves(make, exact_norms):
    problem = in_float64(make(*ALL, FROZEN))
    learner, theta = problem.learner, params.detach(params.named(problem.learner))
    names = list(problem.aligned_parameters())
    feedback = feedback_on(problem, labelled_of(problem))
    downstream(lambda own: problem.feedback_loss({**theta, **own}, feedback.labelled),
               feedback.aligned)  # fmt: skip
    lengths = (feedback.labelled["math"].documents >= 0).sum(dim=1)
    short, middle, long = lengths.argsort(stable=True).split(2)
    halves = []
    for rows in (torch.cat([short, long]), middle):
        part = type(feedback.labelled["math"])(*(
            value[rows] if isinstance(value, torch.Tensor) else value
            for value in feedback.labelled["math"]
        ))  # fmt: skip
        halves.append(gradient(
            lambda own, part=part: target_loss(learner, own, TargetTask(part, OneHot())),
            theta, names,
        ))  # fmt: skip
    a, b = halves
    cosine = params.dot(a, b) / params.norm(a) / params.norm(b)
    assert problem.feedback_record["g_down_agreement"] == pytest.approx(float(cosine), rel=1e-9)


def test_trunk_states_of_answers_are_exact_and_dropped_when_the_trunk_changes(make):
    problem = make(*ALL, FROZEN)
    passes = []
    problem.learner.trunk.layers["0"].register_forward_hook(lambda *_: passes.append(1))
    theta, labelled = params.detach(params.named(problem.learner)), labelled_of(problem)
    losses = [problem.feedback_loss(theta, labelled_of(problem)) for _ in range(2)]
    assert len(passes) == 3
    assert torch.equal(*losses)
    fresh = make(*ALL, FROZEN)
    assert torch.equal(fresh.feedback_loss(theta, labelled_of(fresh)), losses[0])
    problem.learner.load_state_dict(  # as a checkpoint does
        {name: 1.1 * p for name, p in problem.learner.state_dict().items()}
    )
    passes.clear()
    moved = params.detach(params.named(problem.learner))
    loss = problem.feedback_loss(moved, labelled)
    assert len(passes) == 3
    expected = target_loss(problem.learner, moved, TargetTask(labelled["math"], OneHot()))
    torch.testing.assert_close(loss, expected)
    passes.clear()
    held_out = next(iter(problem.held_out_batches(0)))
    problem.feedback_loss(moved, held_out)
    assert len(passes) == 2  # 4 other examples


def test_a_trunk_that_trains_is_read_again_unless_it_moved_less_than_the_tolerance(make):
    exact, tolerant = make(*ALL), make(*ALL, "+problem.trunk_tolerance=0.1")
    for problem, again in ((exact, 3), (tolerant, 0)):
        passes = []
        problem.learner.trunk.layers["0"].register_forward_hook(lambda *_, p=passes: p.append(1))
        theta, labelled = params.detach(params.named(problem.learner)), labelled_of(problem)
        problem.feedback_loss(theta, labelled)
        assert len(passes) == 3
        problem.feedback_loss(params.scale(theta, 1.05), labelled)
        assert len(passes) == 3 + again
        problem.feedback_loss(params.scale(theta, 1.2), labelled)
        assert len(passes) == 6 + again


@pytest.mark.parametrize("choice", [["strategy=tilt"], ["strategy=amortized", "designer=states"]])
def test_g_down_is_renewed_when_the_learner_has_drifted_and_resumes_exactly(make, tmp_path, choice):
    options = [*choice, "strategy.every=1", "strategy.ema=0", "strategy.tolerance=0.002"]

    def strategy():
        return instantiate(composed(*options).strategy, _convert_="all")

    whole, resumed = (make(*ALL, FROZEN, *choice[1:]) for _ in range(2))
    train(tmp_path, whole, strategy(), steps=8)
    records = [
        record
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
        if (record := json.loads(line))["kind"] == "designer"
    ]
    renewals = [k for k, record in enumerate(records) if "g_down_norm" in record]
    assert renewals[0] == 0
    assert 1 < len(renewals) < 8
    for k, record in enumerate(records[1:], start=1):
        assert (record["drift"] > 0.002) == (k in renewals)
    sorted((tmp_path / "checkpoints").glob("*.pt"))[-1].unlink()  # as if killed
    train(tmp_path, resumed, strategy(), steps=8, resume=True)
    assert_identical(weights(whole), weights(resumed))
