"""The language problem at its smallest: a tiny Llama on generated sums, with every strategy."""

import copy
import json
import math

import pytest
import torch
from helpers.small_language import TWO_DOMAINS, composed, fresh_problems, in_float64
from helpers.training import adam, assert_identical, train, weights
from hydra.utils import instantiate

from metavpt import Cosine, Dot, ExactProduct, Fixed, Learned, OneStep
from metavpt.check.modes import Float64
from metavpt.errors import MetaVPTError
from metavpt.feedback.aggregation import DomainMatched
from metavpt.hypergradients import params
from metavpt.hypergradients.linear_targets import LinearProduct
from metavpt.hypergradients.mixed_products import DifferenceProduct
from metavpt.objectives.prediction import predicted_tokens
from metavpt.objectives.target_task import Tilted
from metavpt.strategies.controls import Uniform
from metavpt.strategies.learned import inner_loss
from metavpt.strategies.selection import Greedy

WEIGHTS = ["designer=token_weights"]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    with fresh_problems(tmp_path_factory) as fresh:
        yield fresh


def test_the_linear_product_is_the_exact_one_and_finite_differences_in_phi(make):
    """The hypergradient of the real step in float64, without a backward pass in the learner."""
    problem = in_float64(make())
    batch, labelled = next(iter(problem.meta_batches(1))), next(iter(problem.feedback_batches(2)))
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    phi = params.detach(params.named(problem.designer))
    inner = inner_loss(problem, theta, batch)

    def outer(theta_s):
        return problem.feedback_loss({**theta, **theta_s}, labelled)

    products = (ExactProduct(), LinearProduct(absolute=False), LinearProduct(), DifferenceProduct())
    with Float64():  # transformers normalises in float32
        exact, relative, absolute, difference = (
            OneStep(Dot(), product)([inner], outer, aligned, phi) for product in products
        )
    for estimate, tolerance in ((relative, 1e-9), (absolute, 1e-9), (difference, 1e-6)):
        assert (
            float(
                params.norm(params.add(estimate.by_phi, exact.by_phi, alpha=-1.0))
                / params.norm(exact.by_phi)
            )
            < tolerance
        )
    assert absolute.value == pytest.approx(exact.value, rel=1e-9)
    direction, step = params.zip_with(torch.randn_like, phi), 1e-6
    with Float64():
        moved = (params.add(phi, direction, alpha=s) for s in (step, -step))
        ahead, behind = (
            OneStep(Dot(), ExactProduct())([inner], outer, aligned, there).value for there in moved
        )
    assert (ahead - behind) / (2 * step) == pytest.approx(
        -float(params.dot(exact.by_phi, direction)), rel=1e-6
    )


def test_losses_are_pure(make):
    problem = make()
    batch, labelled = (
        next(iter(problem.pretrain_batches(0))),
        next(iter(problem.feedback_batches(0))),
    )
    theta, task = params.named(problem.learner), problem.designer(batch)
    before, state = weights(problem), torch.get_rng_state()
    values = [
        torch.stack([problem.pretrain_loss(theta, task), problem.feedback_loss(theta, labelled)])
        for _ in range(2)
    ]
    assert torch.equal(*values)
    assert_identical(before, weights(problem))
    assert torch.equal(state, torch.get_rng_state())


def test_the_tail_is_the_loss_and_the_mean_over_its_samples_tokens(make):
    problem = in_float64(make())
    theta = params.detach(params.named(problem.learner))
    batch = next(iter(problem.pretrain_batches(0)))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    for task in (problem.designer(batch), problem.recipe(batch)):
        whole = problem.pretrain_loss(theta, task)
        torch.testing.assert_close(problem.pretrain_tail(theta, task)(aligned), whole)
        counts = batch.loss_mask.sum(dim=1)
        torch.testing.assert_close(
            (problem.per_sample_tail(theta, task)(aligned) * counts).sum() / counts.sum(), whole
        )


def test_learned_with_designer_lr_0_is_fixed_bit_for_bit(make, tmp_path):
    fixed, learned = make(), make()
    train(tmp_path / "fixed", fixed, Fixed(), steps=4)
    train(
        tmp_path / "learned",
        learned,
        Learned(OneStep(), lambda p: adam(p, lr=0.0), every=2),
        steps=4,
    )
    assert_identical(weights(fixed), weights(learned))


def test_feedback_reaches_the_learner_through_the_designer_alone(make, tmp_path):
    """With a designer learning rate of 0 the feedback has no effect; with tilt it has one."""
    other = "+data.feedback.math.seed=5"
    for name, strategy, equal in (
        (
            "learned",
            lambda: Learned(OneStep(), lambda p: torch.optim.Adam(p, lr=0.0), every=1),
            True,
        ),
        ("tilt", lambda: instantiate(composed("strategy=tilt").strategy), False),
    ):
        learners = []
        for k, overrides in enumerate(((), (other,))):
            problem = make(*overrides)
            train(tmp_path / f"{name}{k}", problem, strategy(), steps=2)
            learners.append(params.clone(params.named(problem.learner)))
        assert all(torch.equal(learners[0][n], learners[1][n]) for n in learners[0]) is equal


STRATEGIES = [
    "fixed", "one_step", "one_step_linear", "unrolled", "implicit", "direct", "random_feedback",
    "random_feedback_linear", "tilt",
    "random_tilt", "greedy_targets", "self_distillation", "smoothing", "greedy_selection",
    "adversarial",
]  # fmt: skip


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_runs_and_resumes_exactly(make, tmp_path, name):
    def strategy():
        cfg = composed(f"strategy={name}").strategy
        for key in ("every", "every"):
            if key in cfg:
                cfg[key] = 2
        if "burn_in" in cfg:
            cfg.burn_in = 0
        return instantiate(cfg, _convert_="all")

    whole = make()
    train(tmp_path, whole, strategy(), steps=4)
    log = measured(tmp_path)
    sorted((tmp_path / "checkpoints").glob("*.pt"))[-1].unlink()  # as if killed after step 3
    resumed = make()
    train(tmp_path, resumed, strategy(), steps=4, resume=True)
    assert_identical(weights(whole), weights(resumed))
    assert measured(tmp_path) == log


def measured(folder):
    clock = {"seconds", "samples_per_s"}
    return [
        {k: v for k, v in json.loads(line).items() if k not in clock}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_domains_have_feedback_of_their_own(make, tmp_path):
    problem = make(*TWO_DOMAINS)
    assert dict(problem.feedback_weights) == {"math": 1.0, "other": 1.0}
    batch, labelled = next(iter(problem.meta_batches(0))), next(iter(problem.feedback_batches(0)))
    parts = problem.by_domain(batch)
    assert {name: (part.domain.unique().tolist(), len(part.tokens)) for name,
        part in parts.items()} == {
        "math": ([0], 1), "other": ([1], 1),
    }  # fmt: skip
    theta = params.detach(params.named(problem.learner))
    losses = problem.feedback_losses(theta, labelled)
    assert problem.feedback_loss(theta, labelled) == pytest.approx(
        float(losses["math"] + losses["other"])
    )
    strategy = Learned(
        OneStep(Dot(), LinearProduct(absolute=False)),
        None,
        every=1,
        combination=DomainMatched(),
    )
    train(tmp_path, problem, strategy, steps=2)


def test_samples_are_tokens_without_padding(make):
    problem = make()
    batch = next(iter(problem.pretrain_batches(0)))
    assert problem.num_samples(batch) == sum(len(row[row >= 0]) for row in batch.documents)
    assert problem.num_samples(batch) < batch.tokens.numel()


def test_picked_rows_come_from_the_batches_that_are_named(make):
    problem = make()
    stream = iter(problem.pretrain_batches(0))
    tasks = [problem.recipe(next(stream)) for _ in range(3)]
    which, sample = torch.tensor([2, 0]), torch.tensor([1, 0])
    picked = problem.pick(tasks, which, sample)
    for field in ("tokens", "positions", "documents", "loss_mask", "domain"):
        for k in range(2):
            assert torch.equal(
                getattr(picked.batch, field)[k], getattr(tasks[which[k]].batch, field)[sample[k]]
            )


def test_evaluation_counts_answers_as_steered_and_perplexity_as_a_side_effect(make):
    problem = make("problem.answers.num_samples=2", "problem.answers.ks=[2]")
    names = {
        f"{metric}_{kind}"
        for metric in ("pass@1", "sampled_pass@2")
        for kind in ("strict", "flexible")
    }
    metrics = problem.evaluate()
    assert problem.metric_directions.keys() == metrics.keys()
    assert metrics.keys() == {f"answers/{name}" for name in (*names, "nll")} | {
        "stories/perplexity"
    }
    assert [name for name in metrics if not problem.is_target_metric(name)] == [
        "stories/perplexity"
    ]
    assert problem.evaluate() == metrics
    assert metrics["stories/perplexity"] == pytest.approx(
        270, rel=0.5
    )  # of random weights: about the size of the vocabulary


def test_texts_show_answers_and_the_targets_of_the_last_task(make):
    problem = make()
    problem.evaluate()
    batch = next(iter(problem.pretrain_batches(0)))
    problem.after_step(problem.recipe(batch), 0.0)
    assert problem.texts().passages == []  # nothing was chosen
    assert [answer.question for answer in problem.texts().answers] == [
        p.question for p in problem.data.problems["answers"]
    ]
    theta = params.detach(params.named(problem.learner))
    w = {name: torch.ones_like(theta[name]) for name in problem.aligned_parameters()}
    task = problem.recipe(batch)._replace(targets=Tilted(w, gate=0.4, tau=0.5, num_candidates=6))
    problem.after_step(task, 0.5)
    passage = problem.texts().passages[0]
    text = problem.data.encoder.tokenizer.decode(batch.tokens[0][batch.documents[0] >= 0].tolist())
    assert "".join(token.text for token in passage) == text
    targets = problem.pretrain_tail(theta, task).targets
    chosen = [token for token in passage if token.gate is not None]
    assert len(chosen) == int(batch.loss_mask[0].sum())
    for token, q in zip(chosen, targets, strict=False):
        assert token.gate == pytest.approx(1 - float(q[0]))
        assert token.candidates[0].share == pytest.approx(float(q.max()), abs=1e-4)


def test_texts_show_the_weights_of_the_last_task(make):
    problem = make(*WEIGHTS)
    with torch.no_grad():
        torch.nn.init.normal_(
            problem.designer.head.weight, generator=torch.Generator().manual_seed(0)
        )
        task = problem.designer(next(iter(problem.pretrain_batches(0))))
    problem.after_step(task, 0.5)
    chosen = [token for token in problem.texts().passages[0] if token.gate is not None]
    weights = task.targets.weights[0][task.batch.loss_mask[0]]
    assert [token.weight for token in chosen] == pytest.approx(weights.tolist(), abs=1e-4)
    assert not any(token.candidates for token in chosen)


@pytest.mark.parametrize(
    "strategy",
    [
        Uniform,
        lambda: Greedy(2, every=1),
        lambda: Learned(OneStep(Cosine()), adam, every=1),
    ],
)
def test_strategies_choose_weights_of_tokens(make, tmp_path, strategy):
    problem = make(*WEIGHTS)
    train(tmp_path, problem, strategy(), steps=3)
    weights = problem.last_task.targets.weights[problem.last_task.batch.loss_mask]
    assert float(weights.mean()) == pytest.approx(1.0, abs=1e-5)
    assert float(weights.std()) > 0


BAD = {
    "candidates": (
        ["designer.num_candidates=1000"],
        r"num_candidates=1000: choose from 2 to \d+, the size of the vocabulary",
    ),
    "context": (
        ["problem.length=1000"],
        "problem.length=1000 is longer than the model's context of 512",
    ),
    "domain": (
        ["problem.steered_domains=[maths]"],
        r"problem.steered_domains=\['maths'\]: name domains of the stream, math",
    ),
    "feedback": (["data.num_feedback=100"], r"data\.feedback\.math: has 10 documents"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_error(make, overrides, message):
    with pytest.raises(Exception, match=message) as error:
        make(*overrides)
    assert isinstance(error.value.__cause__, MetaVPTError)


def test_more_candidates_than_tokens_are_an_error_for_tilt_too(make, tmp_path):
    strategy = instantiate(composed("strategy=tilt", "strategy.num_candidates=1000").strategy)
    with pytest.raises(MetaVPTError, match="num_candidates=1000: choose from 1 to"):
        train(tmp_path, make(), strategy, steps=4)


def test_a_copy_of_the_problem_trains_alike(make, tmp_path):
    """`metavpt.check` and comparisons rely on it: all state of a problem is copied."""
    problem = make()
    state = copy.deepcopy(problem.state_dict())
    train(tmp_path / "a", problem, Fixed(), steps=2)
    other = make(seed=3)
    other.load_state_dict(state)
    train(tmp_path / "b", other, Fixed(), steps=2)
    assert_identical(weights(problem), weights(other))


def test_trivial_predictors_are_uniform_and_unigram_tokens(make):
    problem = make()
    scores, metrics = problem.trivial_metrics(), problem.evaluate()
    size = problem.learner.vocab_size
    assert scores["uniform tokens"]["answers/nll"] == pytest.approx(math.log(size))
    assert scores["uniform tokens"]["stories/perplexity"] == size
    assert all(part.keys() <= metrics.keys() for part in scores.values())
    counts = torch.ones(size, dtype=torch.float64)
    (corpus,) = problem.data.feedback.values()
    for batch in problem._in_order(corpus)():
        for b, t in predicted_tokens(batch).nonzero().tolist():
            counts[batch.tokens[b, t]] += 1
    nll, total = 0.0, 0
    for batch in problem._in_order(problem.data.test["answers"])():
        for b, t in predicted_tokens(batch).nonzero().tolist():
            nll -= math.log(counts[batch.tokens[b, t]] / counts.sum())
            total += 1
    assert scores["unigram"]["answers/nll"] == pytest.approx(nll / total, rel=1e-10)
    assert scores["unigram"]["answers/nll"] < scores["uniform tokens"]["answers/nll"]
