"""Numbers and names as a reader wants them."""

import math
import re
from collections.abc import Sequence

from markupsafe import Markup, escape


def number(value: float | None, sign: bool = False) -> str:
    """Four significant digits, or three and a sign for a change; a true minus, a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:+.3g}" if sign and value else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def short(value: float, digits: int = 3) -> str:
    """At most so many significant digits with an exponent, 1.5e−4, as the label of a tick."""
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    text = (mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa) + (
        f"e{int(exponent)}" if value and int(exponent) else ""
    )
    return text.replace("-", "\N{MINUS SIGN}")


def with_error(value: float, error: float | None) -> str:
    """1.2955 ± 0.0012: the error with two digits, and the value with as many decimals."""
    if not error or not 1e-6 <= error < 1e4:
        return number(value) if error is None else f"{number(value)} ± {number(error)}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def hundredths(value: float | None) -> str:
    """Two decimals; a dash for None."""
    return "\N{EN DASH}" if value is None else f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
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
    """A long metric name that a narrow screen may break after / _ . and =."""
    return Markup("").join(
        escape(part) + Markup("<wbr>") for part in re.split(r"(?<=[/_.=])", name)
    )
