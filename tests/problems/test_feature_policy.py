"""data2vec with a policy: which patches, and which features, of the teacher's are asked for."""

import pytest
import torch
from helpers.policies import assert_products_agree
from helpers.small_data2vec import at, in_float64, maker
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from metavpt import Budget, ExactProduct, RunLog, Trainer
from metavpt.check.scene import Scene
from metavpt.feedback.cross_fitted import PatchLabels
from metavpt.hypergradients import params

OPTIONS = ("feedback=cross_fitted", "designer.hidden_width=8", "problem.feedback_batch_size=null")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return maker(tmp_path_factory.mktemp("rooms"), *OPTIONS)


def steered(problem):
    """In float64, with a designer that predicts something."""
    network = problem.designer.network
    problem = in_float64(problem, [network.write.weight, network.position], 0.3)
    torch.nn.init.normal_(problem.designer.directions, std=0.5)
    return problem


@pytest.mark.parametrize("hidden_at", ["input", "tail"])
@pytest.mark.parametrize("surface", ["patches", "features"])
def test_policy_weighs_squared_errors_by_the_pull_of_their_targets(make, surface, hidden_at):
    """Written out: weights (1 + s score / |score|)_+ over their mean, scores (t - s) A."""
    options = (
        f"designer.surface={surface}",
        "designer.strength=2.0",
        f"problem.hidden_at={hidden_at}",
    )
    problem = steered(make("designer=patch_policy", *options))
    theta, _, batch, _ = at(problem)
    with torch.no_grad():
        task = problem.designer(batch)
        states, features = problem._described(task.images)
        told = problem._step(theta, task).student({})
        moves = problem.designer.moves(task, states, features)
        scores = (features - told) * moves
        if surface == "patches":
            scores = scores.mean(dim=2, keepdim=True).expand_as(moves)
        size = (scores.square().mean() + 1e-6).sqrt()
        weights = torch.stack([(1 + 2 * score / size).clamp(min=0) for score in scores.flatten()])
        expected = (weights * (told - features).square().flatten()).mean() / weights.mean()
        assert (weights == 0).any()
        found = problem.pretrain_loss(theta, task)
        per_sample = problem.per_sample_tail(theta, task)({})
    assert float(found) == pytest.approx(float(expected), rel=1e-10)
    assert float(per_sample.mean()) == pytest.approx(float(expected), rel=1e-10)
    assert float(problem.pretrain_tail(theta, task)({})) == pytest.approx(
        float(expected), rel=1e-10
    )


@pytest.mark.parametrize("surface", ["patches", "features"])
def test_policy_products_agree_with_finite_differences(make, surface):
    """Exact = difference product = finite differences in phi, in float64, where no weight is 0."""
    options = (f"designer.surface={surface}", "designer.strength=0.05")
    problem = steered(make("designer=patch_policy", *options))
    assert_products_agree(problem)


def test_random_and_hardest_policies_know_nothing_of_the_feedback(make):
    problem = make("designer=patch_policy")
    batch = next(iter(problem.meta_batches(1)))
    theta = params.detach(params.named(problem.learner))
    with torch.no_grad():
        task = problem.recipe(batch)
        _, features = problem._described(task.images)
        squares = (problem._step(theta, task).student({}) - features).square()
        (random,) = problem.candidates(batch, 1)
        for made, score in [
            (random, random.scores.expand_as(squares)),
            (problem.hardest_task(batch), squares.mean(dim=2, keepdim=True).expand_as(squares)),
        ]:
            weights = (1 + 3 * score / score.square().mean().sqrt()).clamp(min=0)
            expected = (weights * squares).mean() / weights.mean()
            assert float(problem.pretrain_loss(theta, made)) == pytest.approx(
                float(expected), rel=1e-4
            )
    assert random.scores.shape == (4, 16, 1)
    again, other = problem.candidates(batch, 1)[0], problem.candidates(batch._replace(seed=9), 1)[0]
    assert torch.equal(random.scores, again.scores)
    assert not torch.equal(random.scores, other.scores)


def test_hidden_patches_at_the_tail_have_the_states_of_a_blank_image(make):
    problem = make("designer=residuals", "problem.hidden_at=tail", "+backbone.frozen_blocks=1")
    theta, batch = params.detach(params.named(problem.learner)), next(iter(problem.meta_batches(1)))
    with torch.no_grad():
        task = problem.recipe(batch)
        everything = task._replace(hidden=torch.ones_like(task.hidden))
        told = problem._step(theta, everything).student({})
        blank = problem.backbone.trunk(torch.zeros_like(task.images))
        seen = problem.backbone.trunk(task.images)
        prefix = seen.tokens.shape[1] - task.hidden.shape[1]
        tokens = torch.cat([seen.tokens[:, :prefix], blank.tokens[:, prefix:]], dim=1)
        patches = problem.backbone.tail(seen._replace(tokens=tokens)).patches
        expected = torch.nn.functional.layer_norm(patches.flatten(2).transpose(1, 2), (24,))
    torch.testing.assert_close(told, expected)
    assert "mask_token" not in theta


def test_functional_values_are_the_residuals_of_the_teachers_features(make):
    problem = make("designer=residuals", "+backbone.frozen_blocks=1")
    theta = params.detach(params.named(problem.learner))
    labelled = next(iter(problem.feedback_batches(0)))
    labels = labelled["labelled"]
    assert isinstance(labels, PatchLabels)
    assert len(labels.image) == 24  # all of both pools
    values = problem.output_values(theta, labelled)
    with torch.no_grad():
        images = problem.normalize(labels.image, problem.feature_size)
        patches = problem.teacher(images).patches
        features = torch.nn.functional.layer_norm(patches.movedim(1, -1), (24,)).movedim(-1, 1)
        expected = problem.feedback["labelled"].residuals(features, labels)
    torch.testing.assert_close(values["values"], expected.values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        problem.designer.directions, expected.directions, rtol=1e-3, atol=1e-4
    )
    assert values["grid"].tolist() == [[4, 6]] * 24


def test_trunk_states_of_labelled_frames_are_computed_once_while_the_trunk_is_frozen(make):
    problem = make("designer=residuals", "+backbone.frozen_blocks=1")
    passes = []
    problem.backbone.trunk.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    theta = params.detach(params.named(problem.learner))
    labelled = next(iter(problem.feedback_batches(0)))
    first = problem.output_values(theta, labelled)
    assert len(passes) == 6  # microbatches of 4
    loss = problem.feedback_loss(theta, labelled)
    assert len(passes) == 6
    assert torch.isfinite(loss)
    with torch.no_grad():  # as loading a checkpoint does
        for p in problem.backbone.trunk.parameters():
            p.mul_(1.1)
    second = problem.output_values(theta, labelled)
    assert len(passes) == 12
    assert not torch.equal(first["states"], second["states"])


@pytest.mark.parametrize("strategy", ["one_step", "unrolled", "implicit"])
def test_estimators_through_parameters_train_a_policy(make, strategy, tmp_path):
    """The designer reads the directions of the heads, so that its first update is not 0."""
    problem = make("designer=patch_policy")
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", [f"strategy={strategy}", "strategy.every=1", "strategy.burn_in=0"])
    trainer = Trainer(
        problem, instantiate(cfg.strategy, _convert_="all"), Budget(steps=1), RunLog(tmp_path)
    )
    before = {name: p.detach().clone() for name, p in params.named(problem.designer).items()}
    trainer.step()
    assert problem.designer.directions.abs().sum() > 0
    moved = params.zip_with(torch.sub, params.named(problem.designer), before)
    assert moved["network.write.weight"].abs().sum() > 0


def test_check_gives_a_policy_the_directions_of_its_heads(make):
    scene = Scene.of(make("designer=patch_policy"))
    assert scene.problem.designer.directions.abs().sum() > 0
    assert params.norm(scene.one_step(ExactProduct())) > 0


@pytest.mark.parametrize("surface", ["patches", "features"])
def test_the_report_has_a_picture_of_the_weights(make, surface):
    problem = make("designer=patch_policy", f"designer.surface={surface}", "designer.strength=8.0")
    problem.evaluate()  # predictions are drawn too
    recipe = problem.figures()
    assert set(recipe) == {"weights", "predictions"}
    for tensor in (*problem.designer.parameters(), problem.designer.directions):
        torch.nn.init.normal_(tensor)
    assert (problem.figures()["weights"] != recipe["weights"]).any()
