"""Dependencies: phi on the learner's gradient, both losses on theta_S, tail and loss equal."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metavpt.check.finding import Finding, listed
from metavpt.check.scene import Scene, random_direction, relative_error
from metavpt.hypergradients import params
from metavpt.hypergradients.curvature import at_step
from metavpt.hypergradients.linear_targets import LinearLoss
from metavpt.hypergradients.mixed_products import value_and_gradient
from metavpt.hypergradients.params import Params
from metavpt.strategies.learned import tail_loss


def reach(scene: Scene) -> list[Finding]:
    """Check which parameters the losses and their mixed derivative depend on."""
    theta, phi = params.leaves(scene.aligned), params.leaves(scene.phi)
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
    ):  # fused attention has no second derivative
        loss = scene.inner()(phi)(theta)
        gradient = _gradient(loss, theta, create_graph=True)
        reached = {name: g for name, g in gradient.items() if g is not None}
        # A random w, not g_down: whether phi is reached does not hang on the labels.
        w = random_direction(reached, seed=1) if reached else {}
        value = params.dot(w, reached) if reached else loss.new_zeros(())
        by_phi = _gradient(value, phi, retain_graph=True)
        loss_by_phi = _gradient(loss, phi)
    return [_designer(by_phi, loss_by_phi), _pretrain(gradient), _feedback(scene)]


def _designer(by_phi: dict[str, Tensor | None], loss_by_phi: dict[str, Tensor | None]) -> Finding:
    missing = [name for name, g in by_phi.items() if g is None]
    if missing:
        beside = [name for name in missing if loss_by_phi[name] is not None]
        measured = f"the learner's gradient does not depend on {listed(missing)}"
        measured += (
            f" (the loss itself does on {listed(beside)}: an added term that moves no parameter "
            "of the learner)"
            if beside
            else ""
        )
        return Finding(
            "designer_reach",
            "failed",
            measured,
            "use them in the task, drop them, or look for a no_grad or detach on the way to the "
            "loss",
        )
    zero = [name for name, g in by_phi.items() if g is not None and not g.any()]
    if len(zero) == len(by_phi):
        return Finding(
            "designer_reach",
            "failed",
            "the derivative by every parameter is exactly zero",
            "look for rounding, argmax, clamp",
        )
    if zero:
        return Finding(
            "designer_reach",
            "warning",
            f"the derivative by {listed(zero)} is exactly zero beside the starting point",
            "are they used?",
        )
    return Finding(
        "designer_reach",
        "ok",
        f"all {len(by_phi)} parameters of the designer reach the learner's gradient",
    )


def _pretrain(gradient: dict[str, Tensor | None]) -> Finding:
    missing = [name for name, g in gradient.items() if g is None]
    if missing:
        advice = (
            "leave them out of aligned_parameters, or use theta instead of the module's own "
            "parameters in pretrain_loss"
        )
        return Finding(
            "pretrain_reach",
            "failed",
            f"the pretraining loss does not depend on {listed(missing)}",
            advice,
        )
    zero = [name for name, g in gradient.items() if g is not None and not g.any()]
    measured = f"all {len(gradient)} aligned parameters are reached" + (
        f"; zero gradient: {listed(zero)}" if zero else ""
    )
    return Finding("pretrain_reach", "ok", measured)


def _feedback(scene: Scene) -> Finding:
    aligned = params.leaves(scene.aligned)
    with torch.enable_grad():
        gradient = _gradient(scene.feedback(aligned), aligned)
    missing = [name for name, g in gradient.items() if g is None or not g.any()]
    share = sum(aligned[name].numel() for name in missing) / sum(
        p.numel() for p in aligned.values()
    )
    measured = f"{share:.0%} of the aligned entries have no feedback gradient" + (
        f": {listed(missing)}" if missing else ""
    )
    if len(missing) == len(aligned):
        advice = (
            "the feedback loss must use the theta that it is given, and aligned_parameters must "
            "name what it uses"
        )
        return Finding("feedback_reach", "failed", measured, advice)
    return Finding(
        "feedback_reach",
        "ok",
        measured,
        "they cost time and add nothing: aligned_parameters may leave them out" if missing else "",
    )


def tail(scene: Scene) -> Finding:
    """Compare pretrain_tail(theta, task)(theta_s) with pretrain_loss({**theta, **theta_s}, task).

    Values and gradients are compared beside theta_S: a tail that keeps the theta_S that it was made
    with is right only there. A `LinearLoss` is made there too, since what its targets take from the
    learner is fixed with it. A loss that holds the weights of a policy is taken as by a step there.
    """
    theta_s = params.add(scene.aligned, random_direction(scene.aligned, seed=2))
    with torch.no_grad():
        task = scene.task()
        with scene.around():
            loss = at_step(tail_loss(scene.problem, scene.theta, task), theta_s)
            if isinstance(loss, LinearLoss):
                loss = tail_loss(scene.problem, {**scene.theta, **theta_s}, task)

    def by_tail(theta_s: Params) -> Tensor:
        with scene.around():
            return loss(theta_s)

    value, gradient = value_and_gradient(by_tail, theta_s)
    true_value, true_gradient = value_and_gradient(
        lambda theta: scene.pretrain(theta, task), theta_s
    )
    by_value = float((value - true_value).abs() / true_value.abs().clamp_min(1e-12))
    by_gradient = relative_error(gradient, true_gradient)
    measured = (
        f"pretrain_tail differs from pretrain_loss by {by_value:.1e} in value and "
        f"{by_gradient:.1e} in gradient, relative"
    )
    if by_value + by_gradient <= (1e-8 if scene.dtype == torch.float64 else 1e-3):
        return Finding("tail", "ok", measured)
    return Finding(
        "tail",
        "failed",
        measured,
        "pretrain_tail(theta, task)(theta_s) must be pretrain_loss({**theta, **theta_s}, task)",
    )


def _gradient(
    value: Tensor, wrt: Params, *, create_graph: bool = False, retain_graph: bool | None = None
) -> dict[str, Tensor | None]:
    """Compute d value / d wrt, None without a path, which the caller reports."""
    if not value.requires_grad:
        return dict.fromkeys(wrt)
    gradients = torch.autograd.grad(
        value,
        list(wrt.values()),
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return dict(zip(wrt, gradients, strict=True))
