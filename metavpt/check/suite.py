"""All checks in order: what later ones rest on comes first."""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from metavpt.check import backends, precision, reach
from metavpt.check.cost import costs
from metavpt.check.derivatives import Reference, compare, settle
from metavpt.check.finding import Finding, attempt
from metavpt.check.first_order import MakeOptimizer, default_optimizer, first_order
from metavpt.check.learner_step import learner_step
from metavpt.check.purity import held_out, purity
from metavpt.check.scene import Scene
from metavpt.hypergradients import params
from metavpt.hypergradients.estimators import Estimator
from metavpt.hypergradients.mixed_products import DifferenceProduct, ExactProduct
from metavpt.hypergradients.params import Params
from metavpt.problem import Problem

# name, advice, what measures it -> findings
Attempt = Callable[[str, str, Callable[[], Finding | list[Finding]]], list[Finding]]


def check(
    problem: Problem,
    *,
    estimator: Estimator | None = None,
    optimizer: MakeOptimizer | None = None,
    clip_norm: float = math.inf,
    seed: int = 0,
    seconds: float = 60.0,
    started: Callable[[str], None] | None = None,
) -> list[Finding]:
    """Every check on `problem`, which is left as it was, as is the global random state.

    estimator   the one that the run will use: its own product is checked too
    optimizer   parameters -> the learner's optimizer; AdamW by default
    clip_norm   the norm at which the trainer clips the learner's gradient
    seconds     about how long it may take: with the time spent, what remains is repeated less
    started     called with the name of each check before it runs

    Where losses are impure, phi does not arrive or the tail is another loss, what rests on them is
    not measured.
    """
    deadline = time.monotonic() + seconds
    optimizer = optimizer or default_optimizer
    announce = started or (lambda name: None)

    def run(
        name: str, advice: str, measure: Callable[[], Finding | list[Finding]]
    ) -> list[Finding]:
        announce(name)
        return attempt(name, advice, measure)

    # Compiled code has no second derivative to compare with; that it is compiled is a finding of
    # its own.
    with _random_state_kept(), torch.compiler.set_stance("force_eager"):
        announce("compile")
        findings = [backends.compiled(problem, estimator)]
        if not params.named(problem.designer):
            return [
                *findings,
                Finding(
                    "designer",
                    "warning",
                    "the designer has no trainable parameter",
                    "only strategy=fixed can use it",
                ),
            ]
        announce("first batches")
        scene = Scene.of(problem, seed)
        foundations = run("purity", "mend the error first", lambda: purity(scene))
        if not _failed(foundations):
            foundations += run("reach", "mend the error first", lambda: reach.reach(scene))
        announce("float64")
        wide, finding = precision.widen(scene)
        foundations.append(finding)
        if not _failed(foundations):
            foundations += run("tail", "mend pretrain_tail", lambda: reach.tail(wide or scene))
        findings += foundations
        findings += run("held_out", "mend the error first", lambda: held_out(scene, seed))
        if not _failed(foundations):
            findings += _derivatives(scene, wide or scene, estimator, optimizer, clip_norm, run)
            findings += run("attention", "", lambda: backends.attention(scene))
            # costs first: each is measured at least once, while the pairs of first_order shrink to
            # what time is left
            findings += attempt("cost", "", lambda: costs(scene, deadline - seconds / 2, announce))
            findings += run(
                "first_order",
                "use SGD, Adam or AdamW",
                lambda: first_order(scene, optimizer, clip_norm, seed, deadline),
            )
    return findings


def _derivatives(
    scene: Scene,
    wide: Scene,
    estimator: Estimator | None,
    optimizer: MakeOptimizer,
    clip_norm: float,
    run: Attempt,
) -> list[Finding]:
    advice = "mend the error first"
    findings: list[Finding] = []
    references: list[Reference] = []
    truth: list[Params] = []

    def credit() -> Finding:
        reference = Reference.of(wide)
        truth.append(params.scale(reference.exact, -1.0))  # as the run takes it, whatever is cut
        settled, finding = settle(reference)
        references.append(settled)
        return finding

    findings += run("teacher_credit", advice, credit)
    own = getattr(estimator, "product", None)
    products = {"exact_product": ExactProduct(), "difference_product": DifferenceProduct()}
    if own is not None and not isinstance(own, (ExactProduct, DifferenceProduct)):
        products["estimator_product"] = own
    for reference in references:
        for name, product in products.items():
            findings += run(name, advice, lambda n=name, p=product, r=reference: compare(n, p, r))
    for reference in [] if _failed(findings) else references:
        findings += run(
            "learner_step",
            "use SGD, Adam or AdamW",
            lambda r=reference: learner_step(r.scene, estimator, optimizer, clip_norm),
        )
    for by_phi in truth:
        findings += run("dtype", advice, lambda h=by_phi: precision.dtypes(scene, h))
        findings += run(
            "difference_step", advice, lambda h=by_phi: precision.difference_step(scene, h)
        )
    return findings


def _failed(findings: list[Finding]) -> bool:
    return any(finding.verdict == "failed" for finding in findings)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
