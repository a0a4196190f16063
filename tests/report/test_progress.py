import numpy as np
import pytest

from metavpt.report.progress import Progress, progress, samples_to_reach


def test_seeds_are_joined_where_any_was_measured_and_end_with_the_shortest() -> None:
    made = progress([{0: 1.0, 100: 3.0}, {0: 2.0, 50: 2.0, 200: 8.0}])
    assert made.samples.tolist() == [0, 50, 100]
    assert made.mean.tolist() == [1.5, 2.0, 3.5]  # (1 + 2)/2, (2 + 2)/2, (3 + 4)/2
    assert made.error == pytest.approx([0.5, 0.0, 0.5])
    assert progress([{0: 1.0}]).error.tolist() == [0.0]


@pytest.mark.parametrize(
    ("sign", "target", "samples"),
    [
        (-1, 0.5, 75.0),  # half way between 0.75 at 50 and 0.25 at 100
        (-1, 1.0, 0.0),  # from the start
        (-1, 0.25, 100.0),
        (-1, 0.2, None),
        (1, 1.5, None),
        (1, 1.0, 0.0),
    ],
)
def test_where_the_mean_curve_reaches_a_score(
    sign: int, target: float, samples: float | None
) -> None:
    course = Progress(np.array([0.0, 50, 100, 150]), np.array([1, 0.75, 0.25, 0.5]), np.zeros(4))
    assert samples_to_reach(course, target, sign) == samples


def test_thinning_takes_means_of_stretches() -> None:
    made = Progress(np.arange(6.0), np.arange(6.0) ** 2, np.ones(6)).thinned(3)
    assert [values.tolist() for values in made] == [[0.5, 2.5, 4.5], [0.5, 6.5, 20.5], [1, 1, 1]]
    assert len(made.thinned(100).samples) == 3
