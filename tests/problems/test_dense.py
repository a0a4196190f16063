"""Depth and segmentation as two named feedbacks of a real ViT on generated rooms."""

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from metavpt import Budget, Learned, OneStep, RunLog, Trainer
from metavpt.feedback.aggregation import TorchJD
from metavpt.hypergradients import params
from metavpt.strategies.learned import feedback_on

SMALL = [
    "problem=dino_masks", "backbone.tail_blocks=1", "backbone.embed_dim=24", "backbone.depth=2",
    "backbone.num_heads=2",
    "recipe.global_size=16", "recipe.local_size=8", "recipe.num_local=2", "designer.network.base=4",
    "designer.network.depth=1",
    "data.rooms={num_frames: 40, size: [32, 48], seed: 0, folder: null}",
    "data.num_train=16", "data.num_meta=8", "problem.feature_size=[16, 24]",
    "problem.num_prototypes=32", "problem.head_hidden=16", "problem.head_bottleneck=8",
    "problem.batch_size=4",
    "problem.meta_batch_size=4", "problem.feedback_batch_size=4", "problem.head_steps=1",
    "problem.first_head_steps=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(*overrides) -> a fresh problem."""
    folder = tmp_path_factory.mktemp("rooms")

    def fresh(*overrides):
        with initialize_config_module("metavpt.configs", version_base="1.3"):
            cfg = compose("run", [*SMALL, f"data.rooms.folder={folder}", *overrides])
        torch.manual_seed(0)
        return instantiate(cfg.problem, _convert_="all")

    return fresh


def labelled(problem):
    return next(iter(problem.feedback_batches(0)))


def test_the_feedback_loss_is_the_weighted_sum_of_depth_and_segmentation(make):
    problem = make("feedback.depth_weight=2.0", "feedback.segmentation_weight=0.5")
    problem.fit_heads()
    theta, batch = params.detach(params.named(problem.learner)), labelled(problem)
    losses = problem.feedback_losses(theta, batch)
    assert torch.equal(
        problem.feedback_loss(theta, batch), 2.0 * losses["depth"] + 0.5 * losses["segmentation"]
    )


@pytest.mark.parametrize(("zero", "other"), [("depth", "segmentation"), ("segmentation", "depth")])
def test_either_weight_may_be_zero(make, tmp_path, zero, other):
    """One end of the Pareto front: only the other feedback counts, at the cost of one."""
    pytest.importorskip("torchjd")
    designers, spent = [], []
    for name, combination in (("sum", None), ("mgda", TorchJD("MGDA"))):
        problem = make(f"feedback.{zero}_weight=0")
        strategy = Learned(
            OneStep(), lambda p: torch.optim.Adam(p, lr=1e-2), every=2, combination=combination
        )
        budget = Budget(steps=3)
        Trainer(problem, strategy, budget, RunLog(tmp_path / name)).run()
        assert problem.feedback_losses(params.named(problem.learner), labelled(problem)).keys() == {
            other
        }
        spent.append(budget.grad_evals)
        designers.append(params.detach(params.named(problem.designer)))
    assert all(torch.equal(designers[0][name], designers[1][name]) for name in designers[0])
    assert spent[0] == spent[1] > 3


def test_mgda_is_the_closed_form_on_the_gradients_of_the_tail(make):
    pytest.importorskip("torchjd")
    problem = make()
    feedback = feedback_on(problem, labelled(problem))
    record = TorchJD("MGDA")(feedback).record
    g_d, g_s = (
        torch.cat([p.double().flatten() for p in g.values()]) for g in feedback.gradients().values()
    )
    gamma = float(((g_s - g_d) @ g_s / (g_d - g_s).square().sum()).clamp(0, 1))
    assert record["weight/depth"] == pytest.approx(gamma, abs=1e-4)
    assert record["weight/segmentation"] == pytest.approx(1 - gamma, abs=1e-4)
    assert record["conflict/depth-segmentation"] == pytest.approx(
        float(torch.cosine_similarity(g_d, g_s, dim=0)), abs=1e-4
    )


def test_heads_are_fitted_to_several_batches_of_one_pass_through_the_trunk(make):
    """Three batches of 4 where a step has 8 images: two passes, and the heads of three."""
    options = ("problem.batch_size=8", "problem.first_head_steps=3")
    problem, other = make(*options), make(*options)
    images = []
    problem.backbone.trunk.register_forward_hook(
        lambda module, inputs, output: images.append(len(inputs[0]))
    )
    problem.fit_heads()
    assert images == [8, 4]
    theta, heads = params.detach(params.named(other.learner)), other.feedback["labelled"]
    for _ in range(3):
        frames = next(other.head_batches)["labelled"]
        heads.fit(other.patch_features(theta, frames.image), frames)
    for name, value in problem.feedback["labelled"].named_parameters():
        torch.testing.assert_close(value, heads.get_parameter(name))
        assert value.any()
