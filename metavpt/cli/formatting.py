"""Formats for numbers and names."""

import math
import re
from collections.abc import Sequence

from markupsafe import Markup, escape


def number(value: float | None, sign: bool = False) -> str:
    """Format with four significant digits, or with three and a sign for a change. None: a dash."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:+.3g}" if sign and value else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def short(value: float, digits: int = 3) -> str:
    """Format with at most `digits` significant digits and an exponent, as 1.5e−4, for ticks."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    text = (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + (
        f"e{int(exponent)}" if value and int(exponent) else ""
    )
    return text.replace("-", "\N{MINUS SIGN}")


def with_error(value: float, error: float | None) -> str:
    """Format as 1.2955 ± 0.0012: two digits of the error, and the value with as many decimals."""
    if not error or not 1e-6 <= error < 1e4:
        return number(value) if error is None else f"{number(value)} ± {number(error)}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def hundredths(value: float | None) -> str:
    """Format with two decimals. None is a dash."""
    return "\N{EN DASH}" if value is None else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Format seconds as seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def listed(names: Sequence[str]) -> str:
    """Join as in: a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def breakable(name: str) -> Markup:
    """Allow a long metric name to break after / _ . and =."""
    return Markup("").join(
        escape(part) + Markup("<wbr>") for part in re.split(r"(?<=[/_.=])", name)
    )
