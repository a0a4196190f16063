"""Aggregation of feedbacks in strategies and on the command line, and its bad settings."""

import sys
from functools import partial

import pytest
import torch
from helpers.pulled import CONFLICT, Pulled, gradient, trainer
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from metavpt import Learned, MetaVPTError, OneStep
from metavpt.feedback.aggregation import DomainMatched, Feedback, TorchJD, WeightedSum
from metavpt.hypergradients import params
from metavpt.strategies.controls import Direct
from metavpt.strategies.learned import feedback_on
from metavpt.strategies.selection import Greedy, GreedySelection


@pytest.mark.parametrize(
    "make", [partial(Greedy, 2), partial(GreedySelection, 2)], ids=["greedy", "selection"]
)
def test_greedy_values_along_the_combined_gradient(tmp_path, make):
    pytest.importorskip("torchjd")
    problem = Pulled(CONFLICT)
    strategy = make(combination=TorchJD("MGDA"))
    loop = trainer(problem, strategy, tmp_path)
    proposal = strategy.next_task(loop.state)
    expected, combined = gradient(TorchJD("MGDA"), problem)
    assert torch.equal(strategy.state_dict()["g_down"]["p"], expected)
    assert combined.record.items() <= proposal.record.items()
    loop.budget.charge(steps=1)
    assert "weight/a" not in strategy.next_task(loop.state).record


def test_random_feedback_has_the_norm_of_the_combined_gradient(tmp_path):
    pytest.importorskip("torchjd")
    problem, strategy = (
        Pulled(CONFLICT),
        Learned(OneStep(), combination=TorchJD("MGDA"), random_seed=0),
    )
    loop = trainer(problem, strategy, tmp_path)
    found = strategy.estimate(loop.state)[0]
    assert found.diagnostics["g_down_norm"] == pytest.approx(
        float(gradient(TorchJD("MGDA"), problem)[0].norm()), rel=1e-12
    )
    assert found.grad_evals == 2 + 2


def test_direct_trains_the_learner_on_the_combined_loss(tmp_path):
    pytest.importorskip("torchjd")
    problem, strategy = Pulled(CONFLICT), Direct(2.0, combination=TorchJD("MGDA"))
    loop = trainer(problem, strategy, tmp_path)
    proposal = strategy.next_task(loop.state)
    theta = params.named(problem.learner)
    (found,) = torch.autograd.grad(proposal.labelled_loss(theta), list(theta.values()))
    torch.testing.assert_close(found, 2 * gradient(TorchJD("MGDA"), problem)[0], rtol=1e-14, atol=0)
    assert "conflict/a-b" in proposal.record


@pytest.mark.parametrize("make", [Greedy, GreedySelection, Direct])
def test_strategies_without_a_designer_refuse_to_pair_batches(make):
    with pytest.raises(MetaVPTError, match="DomainMatched pairs unlabelled batches"):
        make(combination=DomainMatched())


def test_a_feedback_that_is_not_finite_is_skipped_and_counted(tmp_path):
    pytest.importorskip("torchjd")
    problem = Pulled({**CONFLICT, "b": [float("nan")] * 4})
    strategy = Learned(
        OneStep(), lambda p: torch.optim.SGD(p, lr=1.0), every=2, combination=TorchJD("MGDA")
    )
    before = problem.designer.logits.detach().clone()
    trainer(problem, strategy, tmp_path).run()
    assert strategy.num_skipped == 2
    assert torch.equal(problem.designer.logits, before)


def test_weights_and_conflict_stand_in_the_log_of_a_run(tmp_path):
    pytest.importorskip("torchjd")
    loop = trainer(
        Pulled(CONFLICT), Learned(OneStep(), every=2, combination=TorchJD("MGDA")), tmp_path
    )
    loop.run()
    records = [record for record in loop.log.records() if record["kind"] == "designer"]
    assert len(records) == 2
    for record in records:
        assert record["weight/a"] + record["weight/b"] == pytest.approx(1, abs=1e-12)
        assert -1 <= record["conflict/a-b"] <= 1


def test_a_feedback_that_theta_s_does_not_reach_is_named():
    problem = Pulled(CONFLICT)
    reached = problem.feedback_losses
    problem.feedback_losses = lambda theta, batch: {**reached(theta, batch), "b": torch.zeros(())}
    with pytest.raises(MetaVPTError, match="b depends on none of aligned_parameters"):
        TorchJD("MGDA")(feedback_on(problem, torch.zeros(1)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("MGAD",), r"combination.weighting=MGAD: known are AlignedMTL, .*MGDA"),
        (("FairGrad", {"eps": 1.0}), r"combination.options of FairGrad: .*'eps'"),
        (("MGDA", {"epsilon": 1e-3}), r"combination.options of MGDA: .*epsilon"),
    ],
)
def test_bad_options_are_named(arguments, words):
    pytest.importorskip("torchjd")
    with pytest.raises(MetaVPTError, match=words):
        TorchJD(*arguments)


def test_torchjd_missing_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(
        MetaVPTError, match=r"torchjd cannot be imported .* pip install 'metavpt\[torchjd\]'"
    ):
        TorchJD("UPGrad")


def test_mgda_needs_no_torchjd(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    problem = Pulled(CONFLICT)
    g, _ = gradient(TorchJD("MGDA"), problem)
    assert float(g.norm()) < min(float(g.norm()) for g in problem.gradients.values())


def test_a_missing_solver_is_an_error_that_says_how_to_get_it(monkeypatch):
    mixins = pytest.importorskip("torchjd._mixins")
    monkeypatch.setattr(mixins, "find_spec", lambda name: None)
    with pytest.raises(
        MetaVPTError, match=r"combination.weighting=UPGrad: .*'quadprog'.* pip install"
    ):
        TorchJD("UPGrad")


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(MetaVPTError, match="every weight is 0"):
        Feedback(Pulled(CONFLICT, {"a": 0.0, "b": 0.0}), {}, {}, None).weights  # noqa: B018


@pytest.mark.parametrize(
    "strategy",
    ["one_step", "unrolled", "implicit", "random_feedback", "greedy", "greedy_selection", "direct"],
)
@pytest.mark.parametrize(
    ("choice", "kind"),
    [("weighted_sum", WeightedSum), ("mgda", TorchJD), ("domain_matched", DomainMatched)],
)
def test_combinations_are_a_choice_of_the_command_line(strategy, choice, kind):
    if kind is TorchJD:
        pytest.importorskip("torchjd")
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", [f"strategy={strategy}", f"strategy/combination={choice}"])
    if kind is DomainMatched and strategy in ("greedy", "greedy_selection", "direct"):
        with pytest.raises(Exception, match="pairs unlabelled batches"):
            instantiate(cfg.strategy)
    else:
        made = instantiate(cfg.strategy)
        made = getattr(made, "feedback", made)  # a strategy that keeps g_down has it there
        assert type(made.combination) is kind
