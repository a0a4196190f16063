"""The final number of a written answer, and whether it is the right one."""

import logging
import re
from functools import cache, lru_cache
from typing import Any

from metavpt.data.gsm8k import FINAL
from metavpt.errors import MetaVPTError

# A sign, unless it takes away from a number; dollars; digits in groups of three or not; decimals.
NUMERAL = r"(?:(?<!\d)-)?\$?(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?:(?<!\d)-)?\$?\.\d+"
STRICT = re.compile(rf"{FINAL}\s*({NUMERAL})")
FLEXIBLE = re.compile(NUMERAL)


def strict(text: str) -> str | None:
    """The number after the first `####` that has one, as GSM8K writes it."""
    found = STRICT.search(_plain(text))
    return found[1] if found else None


def flexible(text: str) -> str | None:
    """The last number of the text."""
    found = FLEXIBLE.findall(_plain(text))
    return found[-1] if found else None


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
