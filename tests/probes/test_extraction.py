"""The final number of an answer, strict and flexible, and equality of numerals."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from metavpt.probes.extraction import (
    flexible,
    is_equal,
    is_flexible_match,
    is_strict_match,
    strict,
)

ANSWERS = {  # text -> (strict, flexible)
    "48 / 2 = 24 clips.\n48 + 24 = 72\n#### 72": ("72", "72"),
    "#### 1,600": ("1,600", "1,600"),
    "####$18.50": (None, "$18.50"),
    "#### $18.50": (None, "$18.50"),
    "####42": (None, "42"),
    "####  42": (None, "42"),
    "#### 42.": ("42.", "42"),
    "#### -3": ("-3", "-3"),
    "#### \u22123": (None, "-3"),
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


MATCHES = {  # text, answer -> (strict, flexible)
    ("#### 1,600", "1600"): (True, True),
    ("#### 1600.", "1600"): (True, True),
    ("#### $1,600", "1600"): (False, True),
    ("####42", "42"): (False, True),
    ("#### 3.0", "3"): (False, True),
    ("#### 5 apples\nQuestion: 6?", "5"): (True, False),
    ("#### 5\n#### 6", "5"): (True, False),
    ("the answer is 5", "5"): (False, True),
    ("no number", "5"): (False, False),
}


@pytest.mark.parametrize(("pair", "matches"), MATCHES.items())
def test_strict_compares_characters_and_flexible_numbers(
    pair: tuple[str, str], matches: tuple[bool, bool]
) -> None:
    assert (is_strict_match(*pair), is_flexible_match(*pair)) == matches


def test_strict_is_the_strict_match_of_lm_evaluation_harness() -> None:
    """Its own filter and metric, with the settings of its own task, on random answers."""
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    package = Path(extraction.__file__).parents[1]
    task = yaml.safe_load((package / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    (regex,) = (
        step
        for given in task["filter_list"]
        for step in given["filter"]
        if given["name"] == "strict-match" and step["function"] == "regex"
    )
    filtered = extraction.RegexFilter(regex["regex_pattern"])
    ignored = task["metric_list"][0]["regexes_to_ignore"]
    rng, agreed = random.Random(0), 0
    pieces = [
        "####",
        "#### ",
        "####  ",
        "$",
        "-",
        "42",
        "3",
        ".0",
        ".",
        ",",
        "1,600",
        " ",
        "\n",
        "x",
    ]
    for _ in range(3000):
        text = rng.choice(["", "#### "]) + "".join(rng.choices(pieces, k=rng.randint(1, 4)))
        answer = rng.choice(["42", "3", "1600", "-3"])
        ((found,),) = filtered.apply([[text]], [{}])
        score = metrics.exact_match_hf_evaluate(
            [found], [f"so it is\n#### {answer}"], ignored, ignore_case=True
        )
        assert is_strict_match(text, answer) == bool(score["exact_match"]), text
        agreed += bool(score["exact_match"])
    assert agreed > 30


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
