import re

import numpy as np
import pytest

from metavpt.report.first_order import MAX_POINTS, first_order_chart, first_orders


def test_r_and_slope_are_those_of_all_records() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=500)
    y = 0.5 * x + rng.normal(size=500)
    log = [
        {"kind": "first_order", "step": i, "predicted": p, "realised": q}
        for i, (p, q) in enumerate(zip(x, y, strict=True))
    ]
    log += [
        {"kind": "first_order", "step": 500, "predicted": None, "realised": 1.0},
        {"kind": "train", "step": 1, "predicted": 9, "realised": 9},
    ]
    (found,) = first_orders(log)
    assert found.name == "predicted"
    assert found.fit == (
        pytest.approx(np.corrcoef(x, y)[0, 1]),
        pytest.approx(np.polyfit(x, y, 1)[0]),
        500,
    )
    svg = str(first_order_chart(found, "k", row=2))
    assert svg.count("<use") >= MAX_POINTS
    assert len(re.findall(r"var\(--r2\)", svg)) > 1


def test_one_record_can_be_drawn_and_has_no_r() -> None:
    (found,) = first_orders(
        [{"kind": "first_order", "step": 1, "predicted_plain": 1e-4, "realised": 2e-4}]
    )
    assert (found.name, found.fit.r, found.fit.n) == ("predicted_plain", None, 1)
    assert str(first_order_chart(found, "k")).startswith("<svg")
    assert first_orders([]) == []
