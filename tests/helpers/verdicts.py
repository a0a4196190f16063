"""`check` as tests read it."""

from collections import Counter

from metavpt.check import Finding, check


def findings(problem, **options) -> dict[str, Finding]:
    found = check(problem, **options)
    assert max(Counter(finding.name for finding in found).values()) == 1
    return {finding.name: finding for finding in found}


def failed(problem, **options) -> set[str]:
    return {
        name
        for name, finding in findings(problem, **options).items()
        if finding.verdict == "failed"
    }
