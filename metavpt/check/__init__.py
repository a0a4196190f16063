"""Checks whether hypergradients can be trusted, on the user's own problem and before a run.

from metavpt.check import check, check_product

for finding in check(problem): print(finding)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metavpt.check.derivatives import check_product
    from metavpt.check.finding import Finding
    from metavpt.check.suite import check

__all__ = ["Finding", "check", "check_product"]

# Imported when first used: `python -m metavpt.check` must be able to say that an extra is missing.
HOMES = {"Finding": "finding", "check": "suite", "check_product": "derivatives"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
