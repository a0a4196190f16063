"""Checks whether hypergradients can be trusted, on the user's own problem and before a run.

from metavpt.check import check, check_product

for finding in check(problem): print(finding)
"""

from metavpt.check.derivatives import check_product
from metavpt.check.finding import Finding
from metavpt.check.suite import check

__all__ = ["Finding", "check", "check_product"]
