"""The final number of an answer, strict and flexible, and equality of numerals."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from metavpt.probes.extraction import flexible, is_equal, strict

ANSWERS = {  # text -> (strict, flexible)
    "48 / 2 = 24 clips.\n48 + 24 = 72\n#### 72": ("72", "72"),
    "#### 1,600": ("1,600", "1,600"),
    "####$18.50": ("$18.50", "$18.50"),
    "#### -3": ("-3", "-3"),
    "#### \u22123": ("-3", "-3"),
    "He earned $1,234,567.25 in all.": (None, "$1,234,567.25"),
    "#### 5\nQuestion: and 6?": ("5", "6"),
    "The answer is 7. #### none": (None, "7"),
    "from 10-3 we get 7, so 12": (None, "12"),
    "10-3": (None, "3"),
    "2,34": (None, "34"),
    "a rate of .5": (None, ".5"),
    "no number": (None, None),
    "": (None, None),
}


@pytest.mark.parametrize(("text", "found"), ANSWERS.items())
def test_strict_takes_what_follows_the_mark_and_flexible_the_last_number(
    text: str, found: tuple[str | None, str | None]
) -> None:
    assert (strict(text), flexible(text)) == found


EQUAL = {
    ("72", "72"): True,
    ("$1,600.00", "1600"): True,
    ("1600.", "1600"): True,
    ("0.5", ".5"): True,
    ("-3", "3"): False,
    ("-$3", "-3"): True,
    ("18.5", "18"): False,
    ("9" * 5000, "9"): False,
    (None, "0"): False,
}


@pytest.mark.parametrize(("pair", "equal"), EQUAL.items())
def test_numerals_are_compared_as_numbers(pair: tuple[str | None, str], equal: bool) -> None:
    assert is_equal(*pair) is equal


def test_it_works_in_threads_and_says_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The time limits of math-verify are signals, which only the main thread may set."""
    is_equal.cache_clear()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(is_equal, ["1,024", "7", "8"], ["1024", "7", "9"])) == [
            True,
            True,
            False,
        ]
    assert capfd.readouterr().err == ""
    assert not caplog.records
