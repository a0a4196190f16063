"""Directions against the derivative of their value, in float64, and cases computed by hand."""

import math

import pytest
import torch

from metavpt import AdamAware, Clipped, Cosine, Dot, MetaVPTError, Normalized, Params
from metavpt.hypergradients import params
from metavpt.hypergradients.directions import Direction
from metavpt.hypergradients.optimizer_updates import AdamW, Update

DOWN: Params = {
    "a": torch.tensor([3.0, 0.0], dtype=torch.float64),
    "b": torch.tensor([[4.0]], dtype=torch.float64),
}
PRE: Params = {
    "a": torch.tensor([1.0, -2.0], dtype=torch.float64),
    "b": torch.tensor([[2.0]], dtype=torch.float64),
}
THETA: Params = {
    "a": torch.tensor([0.5, 1.0], dtype=torch.float64),
    "b": torch.tensor([[-1.0]], dtype=torch.float64),
}


def zeros() -> Params:
    return params.zeros_like(PRE)


def update() -> Update:
    rule = AdamW(lr=0.1, weight_decay=0.2)
    theta, state = rule.step(
        THETA, rule.init(THETA), DOWN
    )  # with moments: the first step of Adam goes by the sign alone
    return Update(rule, theta, state)


def test_dot_is_the_feedback_gradient_itself() -> None:
    w, value, _ = Dot()(DOWN, None)
    assert w is DOWN
    assert value is None
    assert (Dot().needs_g_pre, Dot().needs_update) == (False, False)


def test_cosine_of_known_gradients() -> None:
    """|g_down| = 5, |g_pre| = 3, <g_down, g_pre> = 11."""
    w, value, _ = Cosine()(DOWN, PRE)
    assert value is not None
    assert float(value) == pytest.approx(11 / 15, abs=1e-14)
    by_hand = params.scale(params.add(params.scale(DOWN, 1 / 5), PRE, alpha=-11 / 15 / 3), 1 / 3)
    assert all(torch.allclose(w[name], by_hand[name], rtol=0, atol=1e-14) for name in w)
    assert (Cosine().needs_g_pre, Cosine().needs_update) == (True, False)


@pytest.mark.parametrize(
    "direction",
    [
        of if wrap is None else wrap(of)
        for of in (Cosine(), AdamAware())
        for wrap in (None, Normalized, lambda of: Clipped(0.05, of), lambda of: Clipped(1e6, of))
    ],
    ids=str,
)
def test_w_is_the_derivative_of_the_value_by_the_pretraining_gradient(direction: Direction) -> None:
    """By central differences of the value that the direction itself reports."""
    w = direction(DOWN, PRE, update()).w
    eps = 1e-6
    for name in PRE:
        for i in range(PRE[name].numel()):
            values = []
            for sign in (1, -1):
                moved = params.clone(PRE)
                moved[name].view(-1)[i] += sign * eps
                values.append(float(direction(DOWN, moved, update()).value))
            assert float(w[name].view(-1)[i]) == pytest.approx(
                (values[0] - values[1]) / (2 * eps), abs=1e-8
            )


def test_cosine_is_indifferent_to_the_size_of_either_gradient() -> None:
    _, value, _ = Cosine()(params.scale(DOWN, 1e6), params.scale(PRE, 1e-6))
    assert float(value) == pytest.approx(11 / 15, rel=1e-12)  # type: ignore[arg-type]


def test_gradients_of_zero_have_no_direction_and_no_nan() -> None:
    for direction in (Dot(), Cosine(), Normalized(), Clipped(1.0)):
        w, _, _ = direction(zeros(), PRE, None)
        assert params.is_finite(w)
        assert float(params.norm(w)) == 0
    w, value, _ = Cosine()(DOWN, zeros())
    assert float(value) == 0  # type: ignore[arg-type]


def test_adam_aware_is_the_derivative_of_what_the_optimizer_does() -> None:
    w, value, _ = AdamAware()(DOWN, PRE, update())
    eps, (rule, theta, state) = 1e-6, update()

    def drop(g: Params) -> float:
        after, _ = rule.step(theta, state, g)
        return float(params.dot(DOWN, params.add(theta, after, alpha=-1)))

    assert float(value) == pytest.approx(drop(PRE), abs=1e-14)  # type: ignore[arg-type]
    for name in PRE:
        for i in range(PRE[name].numel()):
            above, below = params.clone(PRE), params.clone(PRE)
            above[name].view(-1)[i] += eps
            below[name].view(-1)[i] -= eps
            assert float(w[name].view(-1)[i]) == pytest.approx(
                (drop(above) - drop(below)) / (2 * eps), abs=1e-8
            )
    assert (AdamAware().needs_g_pre, AdamAware().needs_update) == (True, True)


def test_normalized_takes_the_feedback_gradient_at_unit_length() -> None:
    w, value, _ = Normalized()(DOWN, None, None)
    assert float(params.norm(w)) == pytest.approx(1, abs=1e-14)
    assert torch.allclose(w["a"], DOWN["a"] / 5, rtol=0, atol=1e-14)
    assert value is None
    w, value, _ = Normalized(AdamAware())(DOWN, PRE, update())
    plain_w, plain_value, _ = AdamAware()(DOWN, PRE, update())
    assert float(value / plain_value) == pytest.approx(1 / 5, rel=1e-12)  # type: ignore[operator]
    torch.testing.assert_close(w, params.scale(plain_w, 1 / 5), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("max_norm", "length"), [(1.0, 1.0), (5.0, 5.0), (6.0, 5.0)])
def test_clipped_shortens_what_is_longer_and_nothing_else(max_norm: float, length: float) -> None:
    w, value, _ = Clipped(max_norm)(DOWN, None, None)
    assert float(params.norm(w)) == pytest.approx(length, abs=1e-14)
    assert value is None
    if max_norm > 5:
        assert torch.equal(w["a"], DOWN["a"])
    value = Clipped(max_norm, AdamAware())(DOWN, PRE, update()).value
    plain = AdamAware()(DOWN, PRE, update()).value
    assert float(value / plain) == pytest.approx(length / 5, rel=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize("wrap", [Normalized, lambda of: Clipped(1.0, of)])
@pytest.mark.parametrize("of", [Dot(), Cosine(), AdamAware()])
def test_wrappers_need_what_they_wrap(wrap, of: Direction) -> None:
    assert (wrap(of).needs_g_pre, wrap(of).needs_update) == (of.needs_g_pre, of.needs_update)
    aim = wrap(of)(DOWN, PRE, update())
    assert math.isfinite(float(params.norm(aim.w)))


def test_what_is_missing_or_wrong_is_named() -> None:
    with pytest.raises(MetaVPTError, match=r"^Cosine: needs the pretraining gradient g_pre$"):
        Cosine()(DOWN, None)
    for g_pre, step in ((None, update()), (PRE, None)):
        with pytest.raises(
            MetaVPTError,
            match=r"^AdamAware: needs the pretraining gradient and the learner's optimizer; .* "
            r"update=$",
        ):
            AdamAware()(DOWN, g_pre, step)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(MetaVPTError, match=rf"^max_norm={bad}: must be positive$"):
            Clipped(bad)
    assert Clipped(0.5).max_norm == 0.5


@pytest.mark.parametrize("of", [Dot(), Cosine(), AdamAware()], ids=str)
def test_scaling_the_feedback_gradient_does_not_change_the_relative_value(of: Direction) -> None:
    """The unit carries the length of g_down, so value / unit and w / unit are free of it."""
    units = []
    for wrap in (of, Normalized(of), Clipped(0.1, of)):
        w, value, unit = wrap(DOWN, PRE, update())
        unit = float(params.norm(w)) if unit is None else unit
        units.append((params.scale(w, 1 / unit), None if value is None else float(value) / unit))
    for scaled in units[1:]:
        torch.testing.assert_close(scaled, units[0], rtol=1e-12, atol=1e-15)
