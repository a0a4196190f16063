"""The final number of a written answer, and whether it is the right one."""

import logging
import re
from functools import cache, lru_cache
from typing import Any

from metavpt.data.gsm8k import FINAL
from metavpt.errors import MetaVPTError

# A sign, unless it takes away from a number; dollars; digits in groups of three or not; decimals.
NUMERAL = r"(?:(?<!\d)-)?\$?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?:(?<!\d)-)?\$?\.\d+"
FLEXIBLE = re.compile(NUMERAL)
# The filter "strict-match" of the task gsm8k in lm-evaluation-harness, version 3 of the task.
STRICT = re.compile(rf"{FINAL} (-?[0-9.,]+)")


def is_strict_match(text: str, answer: str) -> bool:
    """Score a text as lm-evaluation-harness does under "exact_match,strict-match" of gsm8k.

    What stands after the first `#### ` must be the answer, character by character, but for commas
    and a full stop at the end: `####42`, `#### $42` and `#### 42.0` do not match 42.
    """
    given = strict(text)
    return given is not None and _exact(given) == _exact(answer)


def is_flexible_match(text: str, answer: str) -> bool:
    """Whether the last number of the text equals the answer as a number. This metric is ours."""
    return is_equal(flexible(text), answer)


def strict(text: str) -> str | None:
    """The number after the first `#### ` that has one, as lm-evaluation-harness extracts it."""
    found = STRICT.search(text)
    return found[1] if found else None


def flexible(text: str) -> str | None:
    """The last number of the text."""
    found = FLEXIBLE.findall(_plain(text))
    return found[-1] if found else None


def _exact(number: str) -> str:
    return number.replace(",", "").removesuffix(".")


def _plain(text: str) -> str:
    """The minus of typesetters (U+2212) as a hyphen."""
    return text.replace("\u2212", "-")


@lru_cache(maxsize=65_536)
def is_equal(given: str | None, expected: str) -> bool:
    """Whether two numerals are the same number, by math-verify: 1,600 and $1600.00 are."""
    if given is None:
        return False
    parse, verify = _math_verify()
    return verify(parse(expected), parse(given))


@cache
def _math_verify() -> tuple[Any, Any]:
    """Its `parse` and `verify` without time limits: those use SIGALRM, which fails in threads, and no numeral takes long."""
    try:
        from math_verify import ExprExtractionConfig, parse, verify
    except ImportError:
        raise MetaVPTError(
            "answers are compared by the package math-verify: pip install 'metavpt[language]'"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that there is no time limit
    config = [ExprExtractionConfig()]
    return (
        lambda text: parse(text.replace("$", ""), extraction_config=config, parsing_timeout=None),  # type: ignore[arg-type]
        lambda a, b: verify(a, b, timeout_seconds=None),
    )
