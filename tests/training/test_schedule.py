import math

import pytest

from metavpt.errors import MetaVPTError
from metavpt.training.schedule import WarmupCosine


def test_warmup_rises_linearly_to_one() -> None:
    schedule = WarmupCosine(warmup_steps=4)
    assert [schedule(step, 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_to_final_with_the_budget() -> None:
    schedule = WarmupCosine(final=0.1)
    assert schedule(0, 0.0) == pytest.approx(1.0, abs=1e-15)
    assert schedule(100, 1 / 3) == pytest.approx(
        0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2, abs=1e-15
    )
    assert schedule(999, 1.0) == pytest.approx(0.1, abs=1e-15)


@pytest.mark.parametrize("options", [{"warmup_steps": -1}, {"final": 1.5}, {"final": -0.1}])
def test_options_out_of_range_are_errors(options: dict[str, float]) -> None:
    with pytest.raises(MetaVPTError, match=next(iter(options))):
        WarmupCosine(**options)  # type: ignore[arg-type]
