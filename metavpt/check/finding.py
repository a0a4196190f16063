"""What a check says: one line of what was measured, and what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from metavpt.errors import brief

Verdict = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """`measured` and `advice` are one line each; advice is empty where there is nothing to do."""

    name: str
    verdict: Verdict
    measured: str
    advice: str = ""


def attempt(
    name: str, advice: str, measure: Callable[[], Finding | list[Finding]]
) -> list[Finding]:
    """The findings of `measure`; that it raises is one too.

    The user's code runs inside, so anything may be raised.
    """
    try:
        findings = measure()
    except Exception as error:
        return [Finding(name, "failed", f"raised {brief(error, named=True)}", advice)]
    return findings if isinstance(findings, list) else [findings]


def listed(names: list[str], most: int = 4) -> str:
    """`a, b and 7 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
