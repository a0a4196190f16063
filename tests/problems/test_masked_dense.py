"""MAE and I-JEPA at their smallest: ViT, predictor, patch designers, feedback and probes."""

import copy

import pytest
import torch
from helpers.differences import relative
from helpers.training import Forgetful, adam, assert_identical, own_batch_run, train, weights
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from metavpt import (
    Cosine,
    DifferenceProduct,
    Dot,
    ExactProduct,
    Fixed,
    Implicit,
    Learned,
    MetaVPTError,
    OneStep,
    Unrolled,
)
from metavpt.hypergradients import params
from metavpt.learners.subset import gather_patches
from metavpt.objectives.ijepa import ijepa_loss, normalized_features
from metavpt.objectives.mae import mae_loss, normalized_pixels
from metavpt.strategies.controls import Hardest, Uniform
from metavpt.strategies.learned import inner_loss
from metavpt.strategies.selection import Greedy, GreedySelection

SMALL = [
    "backbone.tail_blocks=1", "backbone.embed_dim=24", "backbone.depth=2", "backbone.num_heads=2",
    "+backbone.patch_size=4",
    "recipe.size=16", "data.rooms={num_frames: 40, size: [32, 48], seed: 0, folder: null}",
    "data.num_train=16", "data.num_meta=8",
    "designer.network.patch_size=4", "designer.network.width=8",
    "problem.feature_size=[16, 24]", "problem.batch_size=4", "problem.meta_batch_size=4",
    "problem.feedback_batch_size=4",
    "problem.head_steps=1", "problem.first_head_steps=2",
]  # fmt: skip
PREDICTOR = ["width=16", "depth=1", "num_heads=2"]
NAMES = ["mae_nyuv2", "ijepa_dense"]
ESTIMATORS = ["straight_through", "relaxed", "score"]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(name, *overrides, seed=0) -> a fresh problem."""
    folder = tmp_path_factory.mktemp("rooms")

    def fresh(name, *overrides, seed=0):
        predictor = [
            f"problem.{'decoder' if name == 'mae_nyuv2' else 'predictor'}.{size}"
            for size in PREDICTOR
        ]
        with initialize_config_module("metavpt.configs", version_base="1.3"):
            cfg = compose(
                "run",
                [f"problem={name}", *SMALL, *predictor, f"data.rooms.folder={folder}", *overrides],
            )
        torch.manual_seed(seed)
        return instantiate(cfg.problem, _convert_="all")

    return fresh


class Doubled(torch.nn.Module):
    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe

    def forward(self, images, seed):
        return self.recipe((images / 255).double(), seed)


def in_float64(problem):
    """The problem in float64 with fitted heads and a designer away from the recipe."""
    problem.fit_heads()
    for module in (
        problem.learner,
        problem.designer,
        problem.feedback,
        getattr(problem, "teacher", problem.learner),
    ):
        module.double()
    torch.nn.init.normal_(problem.designer.network.out.weight, std=0.3)
    problem.designer.recipe = Doubled(problem.designer.recipe)
    return problem


class Point:
    """A problem at one place: what the hypergradient of one step is taken of."""

    def __init__(self, problem):
        batch, labelled = (
            next(iter(problem.meta_batches(1))),
            next(iter(problem.feedback_batches(2))),
        )
        theta = params.detach(params.named(problem.learner))
        self.aligned = {name: theta[name] for name in problem.aligned_parameters()}
        self.phi = params.detach(params.named(problem.designer))
        self.inner = inner_loss(problem, theta, batch)
        self.outer = lambda theta_s: problem.feedback_loss({**theta, **theta_s}, labelled)

    def __call__(self, product, phi=None):
        return OneStep(Dot(), product)(
            [self.inner], self.outer, self.aligned, self.phi if phi is None else phi
        )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NAMES)
def test_exact_and_difference_products_agree_and_are_finite_differences_of_the_relaxed_task(
    make, name, estimator
):
    """In float64, to a relative 1e-6.

    The other two tell autograd of a discrete choice what finite differences cannot see.
    """
    point = Point(in_float64(make(name, f"designer.estimator={estimator}")))
    exact, difference = point(ExactProduct()), point(DifferenceProduct())
    assert params.norm(exact.by_phi) > 0
    assert relative(difference.by_phi, exact.by_phi) < 1e-6
    direction, step = params.zip_with(torch.randn_like, point.phi), 2e-6
    ahead, behind = (
        point(ExactProduct(), params.add(point.phi, direction, alpha=s)).value
        for s in (step, -step)
    )
    if estimator == "relaxed":
        assert (ahead - behind) / (2 * step) == pytest.approx(
            -float(params.dot(exact.by_phi, direction)), rel=1e-6
        )
    else:
        assert ahead == behind


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_the_designer_is_reached(make, name, estimator):
    by_phi = Point(in_float64(make(name, f"designer.estimator={estimator}")))(ExactProduct()).by_phi
    assert [key for key, g in by_phi.items() if not g.any()] == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NAMES)
def test_learned_with_designer_lr_0_is_fixed_bit_for_bit(make, tmp_path, name, estimator):
    fixed, learned = make(name), make(name, f"designer.estimator={estimator}")
    train(tmp_path / "fixed", fixed, Fixed(), steps=2)
    train(
        tmp_path / "learned",
        learned,
        Learned(OneStep(Cosine()), lambda p: adam(p, lr=0.0), every=1),
        steps=2,
    )
    assert_identical(weights(fixed), weights(learned))


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_pure(make, name):
    problem = make(name)
    batch, labelled = (
        next(iter(problem.pretrain_batches(0))),
        next(iter(problem.feedback_batches(0))),
    )
    problem.fit_heads()
    theta, task = params.named(problem.learner), problem.designer(batch)
    before, state = copy.deepcopy(weights(problem)), torch.get_rng_state()
    values = [
        torch.stack([problem.pretrain_loss(theta, task), problem.feedback_loss(theta, labelled)])
        for _ in range(2)
    ]
    assert torch.equal(*values)
    assert_identical(before, weights(problem))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", NAMES)
def test_the_tail_is_the_loss_of_the_whole_learner(make, name, estimator):
    """Against the learner's own forward and the objective, without trunk and tail."""
    problem = in_float64(make(name, f"designer.estimator={estimator}"))
    theta = params.detach(params.named(problem.learner))
    task = problem.designer(next(iter(problem.pretrain_batches(0))))
    aligned = {key: theta[key] for key in problem.aligned_parameters()}
    predictions = problem.learner(task.images, task.visible, task.targets, task.visible_weight)
    if name == "mae_nyuv2":
        loss = mae_loss(
            predictions,
            gather_patches(normalized_pixels(task.images, 4), task.targets),
            task.target_weight,
        )
    else:
        features = normalized_features(problem.teacher(task.images).patches)
        loss = ijepa_loss(predictions, gather_patches(features, task.targets), task.target_weight)
    tail, per_sample = problem.pretrain_tail(theta, task), problem.per_sample_tail(theta, task)
    for value in (problem.pretrain_loss(theta, task), tail(aligned), per_sample(aligned).mean()):
        torch.testing.assert_close(value, loss, atol=1e-12, rtol=1e-12)


def test_the_teacher_follows_the_encoder_at_the_rising_momentum(make):
    problem = make("ijepa_dense", "problem.teacher_momentum=0.5")
    name = "learner.tail.norm.weight"
    with torch.no_grad():
        problem.backbone.tail.norm.weight += 1.0
    before = problem.teacher.state_dict()[name].clone()
    problem.after_step(None, progress=0.5)
    torch.testing.assert_close(problem.teacher.state_dict()[name], before + 0.25, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_pick_takes_each_image_from_the_task_that_is_named(make, name):
    problem = make(name)
    tasks = problem.candidates(next(iter(problem.pretrain_batches(0))), 3)
    which, sample = torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0])
    picked = problem.pick(tasks, which, sample)
    for k in range(3):
        task = tasks[which[k]]
        assert torch.equal(picked.images[k], task.images[sample[k]])
        assert torch.equal(picked.targets[k], task.targets[sample[k]])
        assert torch.equal(picked.visible[k], task.visible[sample[k], : picked.visible.shape[1]])
    assert picked.visible.shape[1] == min(task.visible.shape[1] for task in tasks)


def test_blocks_of_different_sizes_do_not_fit_into_one_task(make):
    problem = make("ijepa_dense")
    batches = iter(problem.pretrain_batches(0))
    by_shape = {}
    while len(by_shape) < 2:
        task = problem.recipe(next(batches))
        by_shape[task.targets.shape] = task
    with pytest.raises(MetaVPTError, match=r"for greedy_selection set designer\.target_scale"):
        problem.pick(list(by_shape.values()), torch.tensor([0, 1]), torch.tensor([0, 0]))


# Together they take every way through a problem that a strategy can.
STRATEGIES = {
    "one_step": lambda: Learned(OneStep(Cosine()), adam, every=2),
    "unrolled": lambda: Learned(Unrolled(2), adam, every=2),
    "implicit": lambda: Learned(Implicit(damping=1e2), adam, every=2),
    "greedy": lambda: Greedy(2, every=2),
    "uniform": Uniform, "hardest": lambda: Hardest(2),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_runs(make, tmp_path, name):
    before = weights(make(name))
    for label, strategy in STRATEGIES.items():
        problem = make(name)
        budget = train(tmp_path / label, problem, strategy(), steps=2).budget
        assert (budget.steps, budget.samples) == (2, 8), label
        after = weights(problem)
        moved = {
            key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])
        }
        assert moved >= {"learner"} | (
            {"designer"} if isinstance(strategy(), Learned) else set()
        ), label


@pytest.mark.parametrize(
    "strategy", [STRATEGIES["one_step"], STRATEGIES["greedy"]], ids=["one_step", "greedy"]
)
@pytest.mark.parametrize("name", NAMES)
def test_runs_resume_exactly(make, tmp_path, name, strategy):
    whole, resumed = make(name), make(name)
    train(tmp_path / "whole", whole, strategy(), steps=3)
    train(tmp_path / "parts", make(name), strategy(), steps=3)
    sorted((tmp_path / "parts" / "checkpoints").glob("*.pt"))[
        -1
    ].unlink()  # as if killed after step 2
    train(tmp_path / "parts", resumed, strategy(), steps=3, resume=True)
    assert_identical(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    ("name", "one_size"),
    [("mae_nyuv2", []), ("ijepa_dense", ["scale=[0.25, 0.25]", "aspect=[1.0, 1.0]"])],
)
def test_greedy_selection_runs_where_tasks_have_one_shape(make, tmp_path, name, one_size):
    problem = make(name, *(f"designer.target_{option}" for option in one_size))
    assert train(tmp_path, problem, GreedySelection(2, every=2), steps=2).budget.samples == 8


@pytest.mark.parametrize("name", NAMES)
def test_metrics_and_figures(make, name):
    problem = make(name)
    assert {"ridge/depth_rmse", "ridge/seg_miou"} <= problem.evaluate().keys()
    figures = problem.figures()
    assert set(figures) == {"masks", "predictions"}
    assert all(picture.dtype == "uint8" and picture.ndim == 3 for picture in figures.values())


def test_an_update_on_the_learners_own_batch_asks_the_teacher_once(make, tmp_path):
    """The run is bit for bit that in which the step asks the teacher again."""
    known, again = make("ijepa_dense"), make("ijepa_dense")
    assert own_batch_run(tmp_path / "known", known)[1] == [1, 1, 1, 1]
    assert own_batch_run(tmp_path / "again", again, Forgetful)[1] == [1, 2, 1, 2]
    assert_identical(weights(known), weights(again))
