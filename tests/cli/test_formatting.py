import pytest

from metavpt.cli.formatting import (
    breakable,
    duration,
    hundredths,
    listed,
    number,
    short,
    with_error,
)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.29551, 0.00119, "1.2955 ± 0.0012"),
        (-0.5, 0.25, "−0.50 ± 0.25"),
        (123.4, 17.0, "123 ± 17"),
        (0.4, None, "0.4"),
        (0.4, 0.0, "0.4 ± 0"),
        (1.0, 1e-9, "1 ± 1e−09"),
    ],
)
def test_a_mean_has_the_decimals_of_its_error(value: float, error: float | None, text: str) -> None:
    assert with_error(value, error) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00015, "1.5e−4"),
        (-2.0, "−2"),
        (0.0, "0"),
        (1.234e6, "1.23e6"),
        (25.0, "2.5e1"),
        (1e-12, "1e−12"),
    ],
)
def test_ticks_are_short(value: float, text: str) -> None:
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (2.34, "2.3 s"),
        (100, "1 min 40 s"),
        (599.7, "10 min"),
        (3599, "1 h 00 min"),
        (5000, "1 h 23 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_and_names() -> None:
    assert [
        number(0.123456),
        number(-0.123456, sign=True),
        number(0.0, sign=True),
        number(None),
    ] == ["0.1235", "−0.123", "0", "–"]
    assert [hundredths(-0.657), hundredths(None)] == ["−0.66", "–"]
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == [
        "a",
        "a and b",
        "a, b and c",
    ]
    assert breakable("a/b<c") == "a/<wbr>b&lt;c<wbr>"
