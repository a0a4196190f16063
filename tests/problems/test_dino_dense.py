"""The main problem at its smallest: ViT, DINO, multi-crop, mask designer, feedback and probes."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from helpers.differences import relative
from helpers.small_dino import SMALL, UNET
from helpers.training import (
    Forgetful,
    adam,
    assert_identical,
    own_batch_run,
    teacher_passes,
    train,
    weights,
)
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from metavpt import (
    Budget,
    Cosine,
    DifferenceProduct,
    Dot,
    ExactProduct,
    Fixed,
    Implicit,
    Learned,
    OneStep,
    RunLog,
    Trainer,
    Unrolled,
)
from metavpt.check.purity import snapshot
from metavpt.hypergradients import params, trees
from metavpt.objectives.dino import center_update
from metavpt.strategies import learned
from metavpt.strategies.controls import Adversarial, Direct, Hardest, Uniform
from metavpt.strategies.learned import inner_loss
from metavpt.strategies.selection import Greedy, GreedySelection
from metavpt.training.engine import make_fabric

NETWORKS = {
    "unet": UNET,
    "dit": [
        "designer=dit",
        "designer.network.patch_size=4",
        "designer.network.width=8",
        "designer.network.depth=1",
    ],
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(*overrides, seed=0) -> a fresh problem."""
    folder = tmp_path_factory.mktemp("rooms")

    def fresh(*overrides, seed=0):
        with initialize_config_module("metavpt.configs", version_base="1.3"):
            networks = (
                []
                if any(override.startswith("designer=") for override in overrides)
                else NETWORKS["unet"]
            )
            cfg = compose("run", [*SMALL, *networks, f"data.rooms.folder={folder}", *overrides])
        torch.manual_seed(seed)
        return instantiate(cfg.problem, _convert_="all")

    return fresh


def measured(folder):
    clock = {"seconds", "samples_per_s"}
    return [
        {k: v for k, v in json.loads(line).items() if k not in clock}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def in_float64(problem):
    """The problem in float64 with fitted heads, its masks away from the kinks of their clamp."""
    problem.fit_heads()
    for module in (problem.learner, problem.teacher, problem.designer, problem.feedback):
        module.double()
    torch.nn.init.normal_(problem.designer.network.out.weight, std=0.05)
    problem.designer.initial_keep = 0.5
    problem.designer.recipe = Doubled(problem.designer.recipe)
    return problem


class Doubled(torch.nn.Module):
    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe

    def forward(self, images, seed):
        return self.recipe((images / 255).double(), seed)


@pytest.mark.parametrize("credit", [False, True], ids=["cut_teacher", "credited_teacher"])
@pytest.mark.parametrize("network", ["unet", "dit"])
def test_exact_and_difference_products_are_finite_differences_in_phi(make, network, credit):
    """The hypergradient of the real step in float64: three methods agree to a relative 1e-6."""
    problem = in_float64(make(*NETWORKS[network], f"problem.teacher_credit={str(credit).lower()}"))
    batch, labelled = next(iter(problem.meta_batches(1))), next(iter(problem.feedback_batches(2)))
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    phi = params.detach(params.named(problem.designer))
    inner = inner_loss(problem, theta, batch)

    def outer(theta_s):
        return problem.feedback_loss({**theta, **theta_s}, labelled)

    exact = OneStep(Dot(), ExactProduct())([inner], outer, aligned, phi)
    difference = OneStep(Dot(), DifferenceProduct())([inner], outer, aligned, phi)
    assert relative(difference.by_phi, exact.by_phi) < 1e-6
    direction = params.zip_with(lambda p: torch.randn_like(p), phi)
    step = 2e-6
    estimator = OneStep(Dot(), ExactProduct())
    ahead, behind = (
        estimator([inner], outer, aligned, params.add(phi, direction, alpha=s)).value
        for s in (step, -step)
    )
    slope = -float(params.dot(exact.by_phi, direction))
    if credit:
        assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-6)
    else:  # the finite difference moves the teacher's targets as well, which the cut leaves out
        assert (ahead - behind) / (2 * step) != pytest.approx(slope, rel=1e-6)


def test_cosine_exact_equals_difference_in_float64(make):
    problem = in_float64(make())
    batch = next(iter(problem.meta_batches(1)))
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    goal = params.zip_with(torch.randn_like, aligned)
    results = [
        OneStep(Cosine(), product)(
            [inner_loss(problem, theta, batch)],
            lambda t: params.dot(goal, t),
            aligned,
            params.detach(params.named(problem.designer)),
        )
        for product in (ExactProduct(), DifferenceProduct())
    ]
    assert relative(results[1].by_phi, results[0].by_phi) < 1e-6
    assert results[0].value == pytest.approx(results[1].value, rel=1e-9)


@pytest.mark.parametrize("own_batch", [False, True], ids=["meta_batch", "own_batch"])
@pytest.mark.parametrize(
    "estimator",
    [OneStep(Cosine()), Unrolled(2), Implicit(damping=1e-2)],
    ids=lambda e: type(e).__name__,
)
def test_learned_with_designer_lr_0_is_fixed_bit_for_bit(make, tmp_path, estimator, own_batch):
    """The designer starts as the recipe, so the whole run is the same, masks or no masks."""
    fixed, learned = make(), make()
    train(tmp_path / "fixed", fixed, Fixed(), steps=6)
    train(
        tmp_path / "learned",
        learned,
        Learned(estimator, lambda p: adam(p, lr=0.0), every=2, own_batch=own_batch),
        steps=6,
    )
    assert_identical(weights(fixed), weights(learned))


@pytest.mark.parametrize("targets", ["sinkhorn", "centering"])
def test_losses_are_pure(make, targets):
    problem = make(f"problem.targets={targets}")
    batch, labelled = (
        next(iter(problem.pretrain_batches(0))),
        next(iter(problem.feedback_batches(0))),
    )
    problem.fit_heads()
    theta, task = params.named(problem.learner), problem.designer(batch)
    before = copy.deepcopy(problem.state_dict())
    first = [problem.pretrain_loss(theta, task), problem.feedback_loss(theta, labelled)]
    second = [problem.pretrain_loss(theta, task), problem.feedback_loss(theta, labelled)]
    assert torch.equal(torch.stack(first), torch.stack(second))
    flat = lambda state: {
        k: v
        for part in ("learner", "teacher", "designer", "center")
        for k, v in state[part].items()
    }
    assert_identical(flat(before), flat(problem.state_dict()))


def test_the_tail_is_the_loss(make):
    problem = make()
    theta = params.detach(params.named(problem.learner))
    task = problem.designer(next(iter(problem.pretrain_batches(0))))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    torch.testing.assert_close(
        problem.pretrain_tail(theta, task)(aligned), problem.pretrain_loss(theta, task)
    )
    torch.testing.assert_close(
        problem.per_sample_tail(theta, task)(aligned).mean(), problem.pretrain_loss(theta, task)
    )


def test_every_parameter_of_the_designer_is_reached(make):
    problem = make()
    train_steps = Learned(OneStep(), adam, every=1)
    train_steps.start(problem)
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    batch, labelled = next(iter(problem.meta_batches(1))), next(iter(problem.feedback_batches(2)))
    problem.fit_heads()
    result = OneStep()(
        [inner_loss(problem, theta, batch)],
        lambda t: problem.feedback_loss({**theta, **t}, labelled),
        aligned,
        params.named(problem.designer),
    )
    assert float(result.by_phi["network.out.weight"].norm()) > 0


def test_pick_takes_each_image_from_the_task_that_is_named(make):
    problem = make()
    batch = next(iter(problem.pretrain_batches(0)))
    tasks = problem.candidates(batch, 3)
    which, sample = torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0])
    picked = problem.pick(tasks, which, sample)
    for k in range(3):
        assert torch.equal(picked.global_crops[:, k], tasks[which[k]].global_crops[:, sample[k]])
        assert torch.equal(picked.local_crops[:, k], tasks[which[k]].local_crops[:, sample[k]])
        assert torch.equal(picked.masks[:, k], tasks[which[k]].masks[:, sample[k]])


STRATEGIES = {
    "greedy": lambda: Greedy(2, every=2),
    "greedy_cosine": lambda: Greedy(2, direction=Cosine(), every=2),
    "selection": lambda: GreedySelection(2, every=2), "uniform": Uniform,
    "hardest": lambda: Hardest(2), "direct": Direct,
    "random_feedback": lambda: Learned(OneStep(), adam, every=2, random_seed=0),
    "adversarial": lambda: Adversarial(adam, every=2),
    "one_step": lambda: Learned(OneStep(Cosine()), adam, every=2),
    "own_batch": lambda: Learned(OneStep(Cosine()), adam, every=2, own_batch=True),
    "unrolled": lambda: Learned(Unrolled(2), adam, every=2),
    "implicit": lambda: Learned(Implicit(damping=1e-2), adam, every=2),
}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_every_strategy_runs_resumes_exactly_and_is_charged(make, tmp_path, strategy):
    whole = make()
    budget = train(tmp_path / "whole", whole, strategy(), steps=4).budget
    assert (budget.steps, budget.samples) == (4, 16)
    train(tmp_path / "parts", make(), strategy(), steps=4)
    newest = sorted((tmp_path / "parts" / "checkpoints").glob("*.pt"))[-1]
    newest.unlink()  # as if killed after step 3
    resumed = make()
    train(tmp_path / "parts", resumed, strategy(), steps=4, resume=True)
    assert_identical(weights(whole), weights(resumed))
    assert measured(tmp_path / "whole") == measured(tmp_path / "parts")


def test_a_step_with_centering_runs_the_teacher_once_and_updates_the_centre(
    make,
):
    problem = make("problem.targets=centering")
    first, second = (
        problem.recipe(batch)
        for _, batch in zip(range(2), problem.pretrain_batches(0), strict=False)
    )
    teacher, asked = problem.teacher.learner, []
    teacher.backbone.trunk.register_forward_hook(lambda *arguments: asked.append(None))
    for task in (first, second):  # of the second nobody has asked yet
        before = snapshot(problem)
        problem.pretrain_loss(params.named(problem.learner), first).backward()
        assert all(trees.same(value, before[key]) for key, value in snapshot(problem).items())
        with torch.no_grad():
            expected = center_update(
                problem.center["center"], teacher(task.global_crops.flatten(0, 1))
            )
        asked.clear()
        problem.after_step(task, 0.0)
        assert len(asked) == (task is second)
        torch.testing.assert_close(problem.center["center"].data, expected)


ALL_TERMS = [f"problem.terms.{term}=1.0" for term in ("dino", "ibot", "gram", "features")]
CENTERING = "problem.targets=centering"
OWN_BATCH = {  # options, of the trainer, passes of the teacher in a step without update and with
    "sinkhorn": (["problem.targets=sinkhorn"], {}, (1, 1)),
    "centering": ([CENTERING], {}, (1, 1)),
    "all_terms": (["objective=dino_features", *ALL_TERMS, CENTERING], {}, (1, 1)),
    "credit": (["problem.teacher_credit=true"], {}, (1, 1)),
    "microbatches": ([CENTERING], {"accumulate": 2}, (3, 4)),
}


@pytest.mark.parametrize(("options", "trainer", "passes"), OWN_BATCH.values(), ids=OWN_BATCH)
def test_an_update_on_the_learners_own_batch_asks_the_teacher_once(
    make, tmp_path, options, trainer, passes
):
    """The run is bit for bit that in which the step asks the teacher again.

    Microbatches ask about their parts, and centering then about the whole.
    """
    found = {}
    for kind in (Learned, Forgetful):
        problem = make(*options)
        torch.nn.init.normal_(problem.designer.network.out.weight, std=0.05)
        run, counts = own_batch_run(tmp_path / kind.__name__, problem, kind, **trainer)
        found[kind] = weights(problem), run.budget.grad_evals
        again = kind is Forgetful and not trainer
        assert counts == [passes[0], passes[1] + again] * 2
    assert_identical(found[Learned][0], found[Forgetful][0])
    assert found[Learned][1] == found[Forgetful][1]


# Estimator, options, and passes of the teacher, the step's among them: with answers kept, without.
ANSWERS = {
    "unrolled": (Unrolled(3), {}, (4, 6)),
    "replayed": (Unrolled(3, kept_graphs=0), {}, (4, 7)),
    "own_batch": (Unrolled(3), {"own_batch": True}, (3, 5)),
    "implicit": (Implicit(damping=1e3), {}, (2, 3)),
}


@pytest.mark.parametrize(("estimator", "options", "passes"), ANSWERS.values(), ids=ANSWERS)
def test_an_estimator_that_makes_a_task_again_asks_the_teacher_once(
    make, tmp_path, monkeypatch, estimator, options, passes
):
    """The run is bit for bit that in which the teacher is asked each time."""
    found = {}
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(learned, "answers_kept", lambda *_: nullcontext())
        problem = make()
        torch.nn.init.normal_(problem.designer.network.out.weight, std=0.05)
        strategy = Learned(estimator, adam, every=1, **options)
        trainer = Trainer(problem, strategy, Budget(steps=9), RunLog(tmp_path / str(kept)))
        trainer.step()  # checks the losses and measures the norm of the gradient
        assert teacher_passes(trainer, steps=2) == [passes[not kept]] * 2
        found[kept] = weights(problem)
    assert_identical(found[True], found[False])


class Spied:
    """Notes the type of the teacher's logits that the next step finds; None: it finds none."""

    def __init__(self, strategy):
        self.strategy, self.found = strategy, []

    def next_task(self, state):
        proposal, known = self.strategy.next_task(state), state.problem.teacher._known
        crops = proposal.task.global_crops.data_ptr()
        is_known = known and known[-1].inputs[0].data_ptr() == crops
        self.found.append(known[-1].answer.logits["dino"].dtype if is_known else None)
        return proposal


def test_under_autocast_the_step_takes_the_updates_answers_in_float32(make, tmp_path):
    fabric = make_fabric("cpu", precision="bf16-mixed")
    trainer, counts = own_batch_run(tmp_path, make(), fabric=fabric)
    assert counts == [1, 1, 1, 1]
    trainer.strategy = Spied(trainer.strategy)
    for _ in range(2):
        trainer.step()
    assert trainer.strategy.found == [None, torch.float32]
    assert trees.is_finite(weights(trainer.problem))


def test_passes_of_an_update_on_the_learners_own_batch_are_counted(make, tmp_path):
    """As many as of an update on a batch of the same size."""
    grad_evals = []
    for own_batch in (False, True):
        strategy = Learned(OneStep(Cosine()), adam, every=2, own_batch=own_batch)
        budget = train(tmp_path / str(own_batch), make(), strategy, steps=4).budget
        grad_evals.append(budget.grad_evals)
    assert grad_evals[0] == grad_evals[1] > 4


def test_centering_resumes_exactly(make, tmp_path):
    whole, resumed = (make("problem.targets=centering") for _ in range(2))
    train(tmp_path / "whole", whole, Fixed(), steps=3)
    train(tmp_path / "parts", make("problem.targets=centering"), Fixed(), steps=3)
    sorted((tmp_path / "parts" / "checkpoints").glob("*.pt"))[-1].unlink()
    train(tmp_path / "parts", resumed, Fixed(), steps=3, resume=True)
    assert_identical(weights(whole), weights(resumed))
    assert float(whole.center["center"].abs().sum()) > 0


def test_metrics_figures_and_evaluation(make):
    problem = make()
    metrics = problem.evaluate()
    assert {
        "ridge/depth_rmse",
        "ridge/depth_abs_rel",
        "ridge/depth_delta1",
        "ridge/seg_miou",
    } <= metrics.keys()
    figures = problem.figures()
    assert set(figures) == {"masks", "predictions"}
    assert all(picture.dtype == "uint8" and picture.ndim == 3 for picture in figures.values())


def test_feedback_pools_and_evaluation_are_disjoint(make):
    data = make().data
    assert not set(data.train) & set(data.meta)
    assert not (set(data.train) | set(data.meta)) & set(data.val)
