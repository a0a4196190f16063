"""DINO with a policy: which patches, and which features, of the teacher's are asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.policies import assert_products_agree
from helpers.small_data2vec import Doubled, at
from helpers.small_dino import SMALL
from helpers.training import assert_identical, train, weights
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from metavpt import Dot, ExactProduct, Fixed, Learned, OneStep
from metavpt.check import reach
from metavpt.check.scene import Scene
from metavpt.hypergradients import params
from metavpt.strategies.controls import Hardest
from metavpt.strategies.function_space import Functional

POLICY = [
    "objective=dino_features", "designer=view_policy", "designer.hidden_width=8",
    "feedback=cross_fitted",
    "problem.feedback_batch_size=null", "+backbone.patch_size=4", "recipe.hidden_prob=1.0",
    "recipe.hidden_share=[0.3,0.5]",
    "++problem.hidden_at=tail",
]  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(*overrides) -> a fresh problem."""
    folder = tmp_path_factory.mktemp("rooms")

    def fresh(*overrides: str) -> Any:
        with initialize_config_module("metavpt.configs", version_base="1.3"):
            cfg = compose("run", [*SMALL, *POLICY, f"data.rooms.folder={folder}", *overrides])
        torch.manual_seed(0)
        return instantiate(cfg.problem, _convert_="all")

    return fresh


def steered(problem: Any) -> Any:
    """In float64, with a policy that predicts something and a student that is not the teacher."""
    for module in (problem.learner, problem.teacher, problem.designer, problem.center):
        module.double()
    for p in (problem.designer.network.write.weight, problem.designer.network.position):
        torch.nn.init.normal_(p, std=0.3)
    torch.nn.init.normal_(problem.designer.directions, std=0.5)
    with torch.no_grad():
        for name, p in params.named(problem.backbone.tail).items():
            p += 0.05 * torch.randn_like(p) if name.endswith("weight") else 0
    problem.designer.recipe = _keeping(problem.designer.recipe)
    return problem


class _keeping(Doubled):
    """In float64, with what the designer asks of the recipe."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "recipe" else getattr(self.recipe, name)


def features_of(backbone: Any, images: torch.Tensor) -> torch.Tensor:
    """Normalised features of patches of global views (2, B, 3, H, W), (2, B, N, D)."""
    patches = backbone(images.flatten(0, 1)).patches.flatten(2).transpose(1, 2)
    return F.layer_norm(patches, patches.shape[-1:]).unflatten(0, images.shape[:2])


def told_by_student(problem: Any, task: Any) -> torch.Tensor:
    """The same of a student that sees a blank image where patches are hidden."""
    crops, hidden = task.global_crops.flatten(0, 1), task.hidden.flatten(0, 1)
    seen = problem.backbone.trunk(crops)
    blank = problem.backbone.trunk(torch.zeros_like(crops))
    tokens = seen.tokens.clone()
    own = tokens[:, -hidden.shape[1] :]
    own[hidden] = blank.tokens[:, -hidden.shape[1] :][hidden]
    patches = problem.backbone.tail(seen._replace(tokens=tokens)).patches
    patches = patches.flatten(2).transpose(1, 2)
    return F.layer_norm(patches, patches.shape[-1:]).unflatten(0, task.global_crops.shape[:2])


@pytest.mark.parametrize("surface", ["patches", "features"])
def test_policy_weighs_the_term_of_features_and_no_other(make, surface):
    options = (f"designer.surface={surface}", "designer.strength=2.0")
    problem = steered(make(*options))
    theta, _, batch, _ = at(problem)
    with torch.no_grad():
        task, recipe = problem.designer(batch), problem.recipe(batch)
        told, targets = (
            told_by_student(problem, task),
            features_of(problem.reference, task.global_crops),
        )
        states = problem.reference.trunk(task.global_crops.flatten(0, 1)).tokens[:, -16:]
        made = problem.designer.weights(
            task, targets - told, states.unflatten(0, (2, -1)), targets
        ).expand_as(told)
        squares = (told - targets).square()
        steered_by = float((made * squares).mean() - squares.mean())
        found = float(problem.pretrain_loss(theta, task))
        plain = float(problem.pretrain_loss(theta, recipe))
        per_sample = problem.per_sample_tail(theta, task)({})
        tail = float(problem.pretrain_tail(theta, task)({}))
    assert (made == 0).any()
    assert abs(steered_by) > 1e-3
    assert found - plain == pytest.approx(steered_by, rel=1e-8)
    assert float(per_sample.mean()) == pytest.approx(found, rel=1e-10)
    assert tail == pytest.approx(found, rel=1e-10)


@pytest.mark.parametrize("surface", ["patches", "features"])
def test_policy_products_agree_with_finite_differences(make, surface):
    """Exact = difference product = finite differences in phi, in float64, where no weight is 0."""
    problem = steered(make(f"designer.surface={surface}", "designer.strength=0.05"))
    assert_products_agree(problem)


def functional() -> Functional:
    return Functional(lambda p: torch.optim.Adam(p, lr=1e-2), phi_steps=4, batch_size=8, every=2)


def test_labels_reach_the_learner_through_the_policy_alone_and_resuming_is_exact(
    make, tmp_path: Path
):
    """With strength 0 the designer learns as before, and the learner is that of `Fixed`."""
    runs = {
        "fixed": (make(), Fixed()),
        "no_strength": (make("designer.strength=0"), functional()),
        "steered": (make(), functional()),
        "hardest": (make(), Hardest()),
    }
    ends = {}
    for name, (problem, strategy) in runs.items():
        train(tmp_path / name, problem, strategy, steps=3)
        ends[name] = weights(problem)
    learner = {
        name: {key: value for key, value in end.items() if not key.startswith("designer.")}
        for name, end in ends.items()
    }
    assert_identical(learner["no_strength"], learner["fixed"])
    assert ends["no_strength"]["designer.network.write.weight"].any()
    different = ["fixed", "steered", "hardest"]
    for i, a in enumerate(different):
        for b in different[i + 1 :]:
            assert any(not torch.equal(learner[a][key], learner[b][key]) for key in learner[a])
    resumed = make()
    sorted((tmp_path / "steered" / "checkpoints").glob("*.pt"))[-1].unlink()  # as if killed
    train(tmp_path / "steered", resumed, functional(), steps=3, resume=True)
    assert_identical(weights(resumed), ends["steered"])


def test_teacher_and_student_share_the_states_of_a_frozen_trunk(make):
    problem = make("+backbone.frozen_blocks=1")
    theta, batch = params.detach(params.named(problem.learner)), next(iter(problem.meta_batches(1)))
    task = problem.recipe(batch)
    passes = []
    for backbone in (problem.backbone, problem.reference):
        backbone.trunk.register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    problem.pretrain_loss(theta, task)
    assert sorted(passes) == [1, 8, 8]  # a blank image, the global crops, the local crops


def test_policies_that_nothing_reads_are_refused(make):
    with pytest.raises(InstantiationException, match=r"problem\.terms\.features"):
        make("objective=dino")
    with pytest.raises(InstantiationException, match="feedback=cross_fitted"):
        make("feedback=ridge", "problem.feedback_batch_size=4")


def test_log_holds_the_noise_of_a_g_down_whose_halves_are_independent(make, tmp_path: Path):
    for through_heads in (True, False):
        learned = Learned(OneStep(Dot(), ExactProduct()), every=1, burn_in=0)
        folder = tmp_path / str(through_heads)
        problem = make(f"feedback.through_heads={through_heads}")
        train(folder, problem, learned, steps=1)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (update,) = (line for line in lines if line["kind"] == "designer")
        if through_heads:  # all frames share the heads that the gradient passes through
            assert "g_down_agreement" not in update
        else:
            assert 0 < abs(update["g_down_agreement"]) < 1


def test_check_finds_the_tail_of_a_policy_right_in_both_precisions(make):
    scene = Scene.of(make())
    assert reach.tail(scene).verdict == "ok"
    assert reach.tail(scene.double()).verdict == "ok"
