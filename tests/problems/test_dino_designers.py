"""Every view designer on the main problem: identity at first, products, differences, controls."""

import pytest
import torch
from helpers.differences import assert_products_are_differences, relative
from helpers.small_dino import ENCODER, SMALL
from helpers.training import adam, train
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from metavpt import Cosine, ExactProduct, Fixed, Learned, OneStep
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import ForwardMode, LinearProduct
from metavpt.strategies.controls import Uniform
from metavpt.strategies.learned import inner_loss
from metavpt.strategies.selection import Greedy, GreedySelection
from metavpt.strategies.tilted_targets import Tilt

PATCHES = [
    "objective=dinov2",
    "+backbone.patch_size=4",
    "recipe.hidden_prob=1.0",
    "recipe.hidden_share=[0.3,0.5]",
]
DESIGNERS = {
    "policy": ["designer=policy", *ENCODER],
    "global_policy": ["designer=policy", "designer.encoder=null"],
    "policy_mask": [
        "designer=policy_mask",
        *(option.replace("designer.", "designer.stages.policy.") for option in ENCODER),
        "designer.stages.mask.network.base=4", "designer.stages.mask.network.depth=1",
    ],
    "selection": ["designer=selection", *ENCODER],
    "prototypes": ["designer=prototypes", *ENCODER, "designer.support=8"],
    "patch_prototypes": ["designer=prototypes", *ENCODER, "designer.support=8",
        "designer.patches=true", *PATCHES],
    "mixer": ["designer=mixer", *ENCODER, *PATCHES],
    "global_mixer": ["designer=mixer", "designer.encoder=null", *PATCHES],
}  # fmt: skip
all_designers = pytest.mark.parametrize("name", DESIGNERS)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(name of a designer, *overrides) -> a fresh problem."""
    folder = tmp_path_factory.mktemp("rooms")

    def fresh(name, *overrides):
        with initialize_config_module("metavpt.configs", version_base="1.3"):
            cfg = compose(
                "run", [*SMALL, *DESIGNERS[name], f"data.rooms.folder={folder}", *overrides]
            )
        torch.manual_seed(0)
        return instantiate(cfg.problem, _convert_="all")

    return fresh


def disturb(problem, scale=0.1):
    """phi beside the recipe; masks from the edge of their range into its middle."""
    generator = torch.Generator().manual_seed(1)
    for parameter in problem.designer.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    for module in problem.designer.modules():
        if hasattr(module, "initial_keep"):
            module.initial_keep = 0.5
    return problem


def in_float64(problem):
    problem.fit_heads()
    for module in (problem.learner, problem.teacher, problem.designer, problem.feedback):
        module.double()
    problem.center.double()
    if (
        problem.learner.mask_token is not None
    ):  # tokens of zeros stand where a layer norm bends most, and differences are far off
        torch.nn.init.normal_(
            problem.learner.mask_token, generator=torch.Generator().manual_seed(2)
        )
    return disturb(problem)


def scene(problem, double=True):
    """theta, the aligned part of it, an unlabelled batch."""
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    batch = next(iter(problem.meta_batches(1)))
    return theta, aligned, batch._replace(images=batch.images.double() / 255) if double else batch


@all_designers
def test_exact_and_difference_products_are_finite_differences_in_phi(make, name):
    """The teacher's part is credited: finite differences in phi see it as well."""
    problem = in_float64(make(name, "problem.teacher_credit=true", "problem.targets=sinkhorn"))
    theta, aligned, batch = scene(problem)
    labelled = next(iter(problem.feedback_batches(2)))
    phi = params.detach(params.named(problem.designer))

    def outer(theta_s):
        return problem.feedback_loss({**theta, **theta_s}, labelled)

    assert_products_are_differences(inner_loss(problem, theta, batch), outer, aligned, phi)


@all_designers
def test_a_new_designer_trains_exactly_as_the_recipe(make, name):
    problem = make(name)
    theta, aligned, batch = scene(problem, double=False)
    with torch.no_grad():
        made, plain = problem.designer(batch), problem.recipe(batch)
    losses = [problem.pretrain_loss(params.leaves(theta), task) for task in (made, plain)]
    assert torch.equal(*losses)
    assert torch.equal(*(problem.per_sample_tail(theta, task)(aligned) for task in (made, plain)))
    assert float(problem.regularizer(problem.designer(batch)).detach()) == pytest.approx(
        0.131 * 0.16 if "mask" in name else 0.0, abs=1e-6
    )


@all_designers
def test_learned_with_designer_lr_0_is_fixed_bit_for_bit(make, tmp_path, name):
    problems = make(name), make(name)
    frozen = Learned(
        OneStep(Cosine()), lambda parameters: torch.optim.Adam(parameters, lr=0.0), every=2
    )
    for problem, strategy, folder in zip(
        problems, (Fixed(), frozen), ("fixed", "learned"), strict=True
    ):
        train(tmp_path / folder, problem, strategy, steps=3)
    fixed, learned = (
        {**problem.learner.state_dict(), **problem.teacher.state_dict()} for problem in problems
    )
    assert [key for key in fixed if not torch.equal(fixed[key], learned[key])] == []


@all_designers
def test_a_learned_designer_leaves_the_recipe(make, tmp_path, name):
    problem = make(name)
    before = params.clone(params.named(problem.designer))
    train(tmp_path, problem, Learned(OneStep(Cosine()), adam, every=1), steps=3)
    after = params.named(problem.designer)
    assert params.is_finite(after)
    assert all(
        not torch.equal(before[key], after[key]) for key in before if not key.endswith("bias")
    )


@pytest.mark.parametrize(
    "strategy",
    [Uniform, lambda: Greedy(2), lambda: GreedySelection(2)],
    ids=["uniform", "greedy", "selection"],
)
@all_designers
def test_controls_draw_from_the_designers_space(make, tmp_path, name, strategy):
    problem = make(name)
    train(tmp_path, problem, strategy(), steps=2)
    assert params.is_finite(params.named(problem.learner))


@all_designers
def test_the_tail_is_the_loss_and_losses_are_pure(make, name):
    problem = disturb(make(name))
    theta, aligned, batch = scene(problem, double=False)
    first, second = (problem.designer(batch) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, torch.Tensor)
    )
    loss = problem.pretrain_loss(theta, first)
    assert torch.equal(loss, problem.pretrain_loss(theta, second))
    torch.testing.assert_close(problem.pretrain_tail(theta, first)(aligned), loss)
    torch.testing.assert_close(problem.per_sample_tail(theta, first)(aligned).mean(), loss)
    assert not torch.equal(loss, problem.pretrain_loss(theta, problem.recipe(batch)))


def test_weights_make_the_loss_the_weighted_mean(make):
    problem = disturb(make("selection"), scale=1.0)
    theta, aligned, batch = scene(problem, double=False)
    task = problem.designer(batch)
    plain = problem.per_sample_tail(theta, task._replace(weights=None))(aligned)
    assert task.weights.std() > 0.01
    torch.testing.assert_close(problem.pretrain_loss(theta, task), (task.weights * plain).sum() / 4)


@all_designers
def test_pick_takes_every_part_of_each_image_from_the_task_that_is_named(make, name):
    problem = make(name)
    batch = next(iter(problem.pretrain_batches(0)))
    tasks = problem.candidates(batch, 3)
    which, sample = torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0])
    picked = problem.pick(tasks, which, sample)._asdict()
    for field, value in picked.items():
        for k in range(3):
            source = getattr(tasks[which[k]], field)
            if not isinstance(source, torch.Tensor):
                assert value == source
            elif field == "weights":
                assert value[k] == source[sample[k]]
            else:
                assert torch.equal(value[:, k], source[:, sample[k]])


FIGURES = {
    "policy": {"policy"}, "global_policy": {"policy"}, "policy_mask": {"policy", "masks"},
    "selection": {"selection"},
    "prototypes": {"prototypes"}, "patch_prototypes": {"prototypes"}, "mixer": {"mix"},
    "global_mixer": {"mix"},
}  # fmt: skip


@all_designers
def test_figures(make, name):
    problem = make(name)
    problem.evaluate()
    figures = problem.figures()
    assert set(figures) == FIGURES[name] | {"predictions"}
    assert all(picture.dtype == "uint8" and picture.ndim == 3 for picture in figures.values())


@pytest.mark.parametrize("name", ["prototypes", "patch_prototypes"])
@pytest.mark.parametrize(
    "terms", [{}, {"koleo": 0.1, "gram": 1.0}], ids=["answers_alone", "other_terms"]
)
def test_the_linear_product_is_the_exact_one_without_a_backward_pass_through_the_learner(
    make, name, terms
):
    problem = in_float64(
        make(name, *(f"problem.terms.{term}={weight}" for term, weight in terms.items()))
    )
    theta, aligned, batch = scene(problem)
    phi = params.leaves(params.named(problem.designer))
    generator = torch.Generator().manual_seed(3)
    w = params.zip_with(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), aligned)
    loss = inner_loss(problem, theta, batch)(phi)
    exact, linear = (
        product(loss, params.leaves(aligned), w, (phi,), retain_graph=True)
        for product in (ExactProduct(), LinearProduct())
    )
    assert relative(linear.by[0], exact.by[0]) < 1e-12
    assert float(linear.value) == pytest.approx(float(exact.value), rel=1e-10)


def test_the_linear_product_refuses_a_designer_of_views(make):
    problem = make("policy")
    theta, aligned, batch = scene(problem, double=False)
    phi = params.leaves(params.named(problem.designer))
    with pytest.raises(MetaVPTError, match="linear in its targets"):
        LinearProduct()(inner_loss(problem, theta, batch)(phi), aligned, aligned, (phi,))


@pytest.mark.parametrize("name", ["prototypes", "patch_prototypes"])
def test_tilted_targets_are_the_best_ones_within_their_trust_region(make, name):
    """Value by differences of the cross-entropies; for a wide tau the mean KL is 1 / (2 tau^2)."""
    problem = in_float64(make(name, "problem.targets=sinkhorn"))
    theta, aligned, batch = scene(problem)
    generator = torch.Generator().manual_seed(3)
    w = params.zip_with(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype), aligned)
    task, tau, eps = problem.recipe(batch), 50.0, 1e-5
    given = problem.tilt(
        theta, task, w, gate=1.0, tau=tau, num_candidates=32, derivative=ForwardMode()
    )
    base, *_ = problem._goals(task)
    reached, *_ = problem._goals(given)
    for term, p in base.items():
        q = reached[term]
        assert torch.allclose(q.sum(-1), torch.ones_like(q.sum(-1)), atol=1e-12)
        assert float((q * (q / p).log()).sum(-1).mean()) * 2 * tau**2 == pytest.approx(
            1.0, rel=0.05
        )

    def log_probs(theta_s):
        logits = problem._student(theta, task)(theta_s)["dino"]
        return (logits / problem.student_temperature).log_softmax(-1)

    slope = (
        log_probs(params.add(aligned, w, alpha=eps)) - log_probs(params.add(aligned, w, alpha=-eps))
    ) / (2 * eps)
    views = torch.arange(len(slope))
    value = torch.stack(
        [slope[views != g].sum(0) for g in range(2)]
    )  # A up to a factor: what raising log p along w is worth
    wanted = (reached["dino"] / base["dino"]).log()
    wanted, value = (x - (base["dino"] * x).sum(-1, keepdim=True) for x in (wanted, value))
    assert torch.corrcoef(torch.stack([wanted.flatten(), value.flatten()]))[0, 1] > 1 - 1e-6


def test_a_tilt_of_no_temperature_gives_all_to_the_best_candidate(make):
    problem = in_float64(make("prototypes", "problem.targets=sinkhorn"))
    theta, aligned, batch = scene(problem)
    task = problem.recipe(batch)
    given = problem.tilt(
        theta, task, aligned, gate=1.0, tau=0.0, num_candidates=8, derivative=ForwardMode()
    )
    base, reached = problem._goals(task)[0]["dino"], problem._goals(given)[0]["dino"]
    top, index = base.topk(8)
    best = index.gather(-1, given.scores.gather(-1, index).argmax(-1, keepdim=True))
    assert torch.allclose(reached.gather(-1, best)[..., 0], top.sum(-1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_candidates": 33}, "num_candidates=33 is more than the 32"),
        ({"num_candidates": 8}, "no term"),
    ],
)
def test_a_tilt_that_cannot_be(make, options, words):
    none = ["problem.terms={dino: 0, gram: 1}"] if words == "no term" else []
    problem = make("prototypes", *none)
    theta, aligned, batch = scene(problem, double=False)
    with pytest.raises(MetaVPTError, match=words):
        problem.tilt(
            theta,
            problem.recipe(batch),
            aligned,
            gate=0.5,
            tau=1.0,
            derivative=ForwardMode(),
            **options,
        )


def test_the_tilt_is_a_strategy_of_the_main_problem_with_no_designer(make, tmp_path):
    """A gate of 0 is the recipe bit for bit; an open one leads elsewhere."""
    runs = {}
    for name, strategy in {
        "fixed": Fixed(),
        "shut": Tilt(gate=0.0, num_candidates=8),
        "open": Tilt(gate=1.0, num_candidates=8),
    }.items():
        problem = make("prototypes", "problem.targets=sinkhorn")
        train(tmp_path / name, problem, strategy, steps=2)
        runs[name] = params.detach(params.named(problem.learner))
    assert all(torch.equal(runs["fixed"][name], p) for name, p in runs["shut"].items())
    assert relative(runs["open"], runs["fixed"]) > 0
