"""Objectives of several terms on the main problem: DINOv2's and DINOv3's recipes, and each term."""

import copy

import pytest
import torch
from helpers.differences import assert_products_are_differences
from helpers.small_dino import ENCODER, SMALL, UNET
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from metavpt import (
    Budget,
    Checkpoints,
    Cosine,
    ExactProduct,
    Fixed,
    Learned,
    OneStep,
    RunLog,
    Trainer,
)
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import GaussNewton
from metavpt.objectives.dino import centered_probs, dino_loss, sinkhorn_probs
from metavpt.objectives.gram import gram_loss
from metavpt.objectives.ibot import ibot_loss
from metavpt.objectives.koleo import koleo_loss
from metavpt.strategies.learned import inner_loss

PATCHES = ["+backbone.patch_size=4", "recipe.hidden_prob=0.8", "recipe.hidden_share=[0.2,0.5]"]
OBJECTIVES = {
    "dino": ["objective=dino"],
    "ibot": [
        "objective=dino",
        "problem.terms.dino=0",
        "problem.terms.ibot=2.0",
        "problem.targets=sinkhorn",
    ],
    "ibot_centering": ["objective=dinov2", "problem.terms.koleo=0", "problem.targets=centering"],
    "koleo": ["objective=dino", "problem.terms.koleo=0.5", "problem.targets=sinkhorn"],
    "gram": ["objective=dino", "problem.terms.dino=0", "problem.terms.gram=3.0"],
    "gram_frozen": [
        "objective=dino",
        "problem.terms.dino=0",
        "problem.terms.gram=3.0",
        "problem.gram_anchor=frozen",
    ],
    "dinov2": ["objective=dinov2"],
    "dinov3": ["objective=dinov3", "problem.pool=cls"],
}
all_objectives = pytest.mark.parametrize("name", OBJECTIVES)
full_objectives = pytest.mark.parametrize("name", ["ibot_centering", "dinov2", "dinov3"])


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(name of an objective, *overrides) -> a problem whose student has left the teacher."""
    folder = tmp_path_factory.mktemp("rooms")

    def fresh(name, *overrides):
        designer = [] if any(override.startswith("designer=") for override in overrides) else UNET
        with initialize_config_module("metavpt.configs", version_base="1.3"):
            cfg = compose(
                "run",
                [
                    *SMALL,
                    *PATCHES,
                    *designer,
                    *OBJECTIVES[name],
                    f"data.rooms.folder={folder}",
                    *overrides,
                ],
            )
        torch.manual_seed(0)
        problem = instantiate(cfg.problem, _convert_="all")
        disturb(problem.learner, 0.05)
        return problem

    return fresh


def disturb(module, scale):
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)


def in_float64(problem):
    """With fitted heads and phi away from the recipe; masks move from the edge of their range."""
    problem.fit_heads()
    for value in vars(problem).values():
        if isinstance(value, torch.nn.Module):
            value.double()
    disturb(problem.designer, 0.1)
    for module in problem.designer.modules():
        if hasattr(module, "initial_keep"):
            module.initial_keep = 0.5
    return problem


def scene(problem, double=True):
    """theta, the aligned part of it, an unlabelled batch."""
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    batch = next(iter(problem.meta_batches(1)))
    return theta, aligned, batch._replace(images=batch.images.double() / 255) if double else batch


def by_modules(problem, task):
    """Every term from the modules and its own function on whole maps, by name; each (B,)."""
    learner, teacher, batch_size = (
        problem.learner,
        problem.teacher.learner,
        task.global_crops.shape[1],
    )
    tokens = lambda features: (
        features.patches.flatten(2).transpose(1, 2).unflatten(0, (2, batch_size))
    )
    head = lambda model: model.patch_head or model.head
    crops = task.global_crops.flatten(0, 1)
    hiding = (
        {"hidden": task.hidden.flatten(0, 1), "mask_token": learner.mask_token}
        if task.hidden is not None
        else {}
    )
    seen = learner.backbone.tail(learner.backbone.trunk(crops, **hiding))
    whole = teacher.backbone(crops)
    losses = {}

    def probs(logits, center):
        if problem.targets == "sinkhorn":
            return sinkhorn_probs(logits, problem.teacher_temperature)
        return centered_probs(logits, problem.center[center], problem.teacher_temperature)

    if "dino" in problem.terms:
        logits = [
            *learner.head(learner.summary(seen)).unflatten(0, (2, batch_size)),
            *(learner(local) for local in task.local_crops),
        ]
        losses["dino"] = dino_loss(
            logits, probs(teacher(crops).unflatten(0, (2, batch_size)), "center"), 0.1, "none"
        )
    if "ibot" in problem.terms:
        logits, goals = (
            head(learner)(tokens(seen)),
            torch.zeros(2, batch_size, tokens(seen).shape[2], 32).to(crops),
        )
        goals[task.hidden] = probs(head(teacher)(tokens(whole))[task.hidden], "patch_center")
        losses["ibot"] = (
            sum(ibot_loss(logits[v], goals[v], task.hidden[v], 0.1, "none") for v in range(2)) / 2
        )
    if "koleo" in problem.terms:
        losses["koleo"] = sum(
            koleo_loss(view, reduction="none")
            for view in learner.summary(seen).unflatten(0, (2, batch_size))
        )
    if "gram" in problem.terms:
        anchored = tokens(whole if problem.anchor is None else problem.anchor(crops))
        losses["gram"] = sum(gram_loss(tokens(seen)[v], anchored[v], "none") for v in range(2)) / 2
    return losses


@all_objectives
def test_the_loss_is_the_weighted_sum_of_the_terms_own_functions(make, name):
    problem = in_float64(make(name))
    problem.center["center"].data.normal_(std=0.1)
    theta, aligned, batch = scene(problem)
    with torch.no_grad():
        task = problem.designer(batch)
        losses = by_modules(problem, task)
        expected = sum(problem.terms[term] * loss for term, loss in losses.items())
        assert losses.keys() == problem.terms.keys()
        assert all(loss.abs().max() > 1e-6 for loss in losses.values())
        torch.testing.assert_close(
            problem.per_sample_tail(theta, task)(aligned), expected, atol=1e-10, rtol=1e-10
        )
    torch.testing.assert_close(
        problem.pretrain_tail(theta, task)(aligned), expected.mean(), atol=1e-10, rtol=1e-10
    )
    torch.testing.assert_close(
        problem.pretrain_loss(theta, task), expected.mean(), atol=1e-10, rtol=1e-10
    )


@all_objectives
def test_exact_and_difference_products_are_finite_differences_in_phi(make, name):
    problem = in_float64(make(name, "problem.teacher_credit=true", "feedback=ridge"))
    theta, aligned, batch = scene(problem)
    labelled = next(iter(problem.feedback_batches(2)))
    phi = params.detach(params.named(problem.designer))
    inner = inner_loss(problem, theta, batch)

    def outer(theta_s):
        return problem.feedback_loss({**theta, **theta_s}, labelled)

    assert_products_are_differences(inner, outer, aligned, phi)


@all_objectives
def test_every_parameter_of_the_learner_is_reached(make, name):
    """The mask token and both heads with the rest."""
    problem = make(name)
    _, _, batch = scene(problem, double=False)
    theta = params.leaves(params.named(problem.learner))
    loss = problem.pretrain_loss(theta, problem.recipe(batch))
    grads = dict(
        zip(
            theta,
            torch.autograd.grad(
                loss, list(theta.values()), allow_unused=True, materialize_grads=True
            ),
            strict=True,
        )
    )
    idle = {key.split(".")[0] for key, grad in grads.items() if not grad.any()}
    assert idle == (
        set() if {"dino", "ibot"} & problem.terms.keys() else {"head"}
    )  # gram reads features alone
    assert ("mask_token" in theta) == ("ibot" in problem.terms)
    assert any(key.startswith("patch_head.") for key in theta) == (
        problem.patch_head == "patch_head"
    )


@full_objectives
def test_losses_are_pure_and_state_moves_after_the_step(make, name):
    problem = make(name)
    theta, _, batch = scene(problem, double=False)
    task = problem.designer(batch)
    before = copy.deepcopy(problem.state_dict())
    assert torch.equal(problem.pretrain_loss(theta, task), problem.pretrain_loss(theta, task))
    moved = changed(before, problem.state_dict())
    assert moved == set()
    teacher = problem.teacher.learner
    with torch.no_grad():
        patches = (
            teacher.backbone(task.global_crops.flatten(0, 1)).patches.flatten(2).transpose(1, 2)
        )
        logits = teacher.patch_head(patches[task.hidden.flatten(0, 1)])
        problem.after_step(task, 0.0)
    assert changed(before, problem.state_dict()) == {"teacher"} | (
        {"center"} if problem.targets == "centering" else set()
    )
    if problem.targets == "centering":
        torch.testing.assert_close(problem.center["patch_center"].data, 0.1 * logits.mean(0))


def changed(before, after):
    return {
        part for part in ("learner", "teacher", "designer", "center", "anchor") if part in before
        if any(not torch.equal(value, after[part][key]) for key, value in before[part].items())
    }  # fmt: skip


def test_a_frozen_anchor_stays_and_an_ema_one_follows(make, tmp_path):
    problem = make("gram_frozen")
    before = copy.deepcopy(problem.anchor.state_dict())
    Trainer(problem, Fixed(), Budget(steps=2), RunLog(tmp_path)).run()
    assert all(
        torch.equal(value, problem.anchor.state_dict()[key]) for key, value in before.items()
    )
    assert not torch.equal(
        problem.learner.backbone.tail.norm.weight, problem.anchor.learner.tail.norm.weight
    )
    assert make("gram").anchor is None


def test_a_weight_of_zero_leaves_nothing_behind(make):
    """Neither parameters nor hidden patches nor heads, and the loss of DINO alone, bit for bit."""
    zero = [f"problem.terms.{term}=0" for term in ("ibot", "koleo", "gram")]
    plain, zeros = (
        make("dino"),
        make("dinov3", *zero, "problem.targets=centering", "problem.pool=mean"),
    )
    assert plain.learner.state_dict().keys() == zeros.learner.state_dict().keys()
    assert (zeros.anchor, zeros.learner.patch_head, zeros.learner.mask_token) == (None, None, None)
    losses = []
    for problem in (plain, zeros):
        theta, _, batch = scene(problem, double=False)
        task = problem.recipe(batch)
        assert task.hidden is None
        losses.append(problem.pretrain_loss(theta, task))
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ["ibot_centering", "dinov3"])
def test_learned_with_designer_lr_0_is_fixed_and_a_run_resumes_bit_for_bit(make, tmp_path, name):
    mixer = ["designer=mixer", *ENCODER]
    problems = {part: make(name, *mixer) for part in ("fixed", "learned", "resumed")}
    frozen = lambda: Learned(OneStep(Cosine()), lambda p: torch.optim.Adam(p, lr=0.0), every=2)
    strategies = {"fixed": Fixed(), "learned": frozen(), "resumed": frozen()}
    trainer = lambda part, steps: Trainer(
        problems[part], strategies[part], Budget(steps=steps), RunLog(tmp_path / part),
        Checkpoints(tmp_path / part / "checkpoints"),
        log_every=1, checkpoint_every=1,
    )  # fmt: skip
    trainer("fixed", 3).run()
    trainer("learned", 3).run()
    trainer("resumed", 3).run()
    sorted((tmp_path / "resumed" / "checkpoints").glob("*.pt"))[
        -1
    ].unlink()  # as if killed after step 2
    problems["resumed"], strategies["resumed"] = make(name, *mixer), frozen()
    again = trainer("resumed", 3)
    again.resume()
    again.run()
    for part in ("learned", "resumed"):
        assert changed(problems["fixed"].state_dict(), problems[part].state_dict()) == set()


def test_gauss_newton_is_the_second_derivative_where_the_loss_is_convex_in_logits(make):
    """<v, A v> >= 0 for DINO and iBOT together: packed outputs carry the curvature of all terms."""
    problem = in_float64(make("ibot_centering"))
    theta, aligned, batch = scene(problem)
    loss = problem.pretrain_tail(theta, problem.recipe(batch))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        v = params.zip_with(
            lambda p, g=generator: torch.randn(p.shape, generator=g, dtype=p.dtype), aligned
        )
        assert float(params.dot(v, GaussNewton()(loss, aligned, v, ExactProduct()))) > 0


@pytest.mark.parametrize(
    "changes",
    [["problem.patch_head=both"], ["problem.gram_anchor=ema"], ["problem.targets=softmax"]],
)
def test_unknown_choices_are_refused(make, changes):
    with pytest.raises(Exception, match="known are") as failure:
        make("dinov2", *changes)
    assert isinstance(failure.value.__cause__, MetaVPTError)
