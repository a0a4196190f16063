import math

import pytest

from metavpt.learners.annealing import cosine


def test_cosine_runs_from_start_to_end_and_stays_there() -> None:
    assert cosine(0.996, 1.0, 0.0) == pytest.approx(0.996, abs=1e-14)
    assert cosine(0.996, 1.0, 0.5) == pytest.approx(0.998, abs=1e-14)
    assert cosine(0.996, 1.0, 1.0) == cosine(0.996, 1.0, 1.1) == 1.0
    assert cosine(0.5, 0.9, 0.3) == pytest.approx(
        0.9 - 0.4 * (1 + math.cos(0.3 * math.pi)) / 2, abs=1e-14
    )
