"""Whether a problem's hypergradients can be trusted: measured on the user's own problem, before a run is spent on it.

from metavpt.checks import check, check_product

for finding in check(problem): print(finding)
"""

from metavpt.checks.derivatives import check_product
from metavpt.checks.finding import Finding
from metavpt.checks.suite import check

__all__ = ["Finding", "check", "check_product"]
