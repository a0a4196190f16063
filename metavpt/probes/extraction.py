"""The final number of a generated answer, and the test whether it is right."""

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
    """Compare a text with the answer as lm-evaluation-harness does (gsm8k, strict-match).

    The number after the first `#### ` must equal the answer as a string, except for commas and a
    final full stop. `####42`, `#### $42` and `#### 42.0` do not match 42.
    """
    given = strict(text)
    return given is not None and _exact(given) == _exact(answer)


def is_flexible_match(text: str, answer: str) -> bool:
    """Return whether the last number of the text equals the answer as a number.

    This metric is our own.
    """
    return is_equal(flexible(text), answer)


def strict(text: str) -> str | None:
    """Return the number after the first `#### `, as lm-evaluation-harness extracts it."""
    found = STRICT.search(text)
    return found[1] if found else None


def flexible(text: str) -> str | None:
    """Return the last number of the text."""
    found = FLEXIBLE.findall(_plain(text))
    return found[-1] if found else None


def _exact(number: str) -> str:
    return number.replace(",", "").removesuffix(".")


def _plain(text: str) -> str:
    """Replace the typographic minus (U+2212) by a hyphen."""
    return text.replace("\u2212", "-")


@lru_cache(maxsize=65_536)
def is_equal(given: str | None, expected: str) -> bool:
    """Return whether two numerals are the same number by math-verify, as 1,600 and $1600.00 are."""
    if given is None:
        return False
    parse, verify = _math_verify()
    return verify(parse(expected), parse(given))


@cache
def _math_verify() -> tuple[Any, Any]:
    """Return `parse` and `verify` of math-verify without their time limits.

    The limits use SIGALRM, which fails in threads. Numerals are short.
    """
    try:
        from math_verify import ExprExtractionConfig, parse, verify
    except ImportError:
        raise MetaVPTError(
            "the package math-verify, which compares answers, is missing: "
            "pip install 'metavpt[language]'"
        ) from None
    # math-verify warns that there is no time limit.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [ExprExtractionConfig()]

    def read(text: str) -> Any:
        plain: Any = text.replace("$", "")
        options: Any = {"extraction_config": config, "parsing_timeout": None}
        return parse(plain, **options)

    return read, lambda a, b: verify(a, b, timeout_seconds=None)
