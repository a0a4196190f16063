"""A comparison in a sentence or two."""

from metavpt.cli.formatting import listed
from metavpt.compare.paired_statistics import MIN_SEEDS, Paired
from metavpt.compare.table import Table

VERBS = {"better": ("beats", "beat"), "worse": ("is worse than", "are worse than")}


def headline(table: Table) -> str:
    """Which rows beat the reference on which steered metric, and which fall behind it, by an interval that excludes zero."""
    reference = table.reference
    if not table.has_reference:
        return f"No finished row {reference}, so there is nothing to compare with."
    pairs = {
        (row, name): pair
        for row in table.rows[1:]
        for name in table.metrics
        if name in table.steered[row] and (pair := table.cells[row, name].paired)
    }
    if not pairs:
        return f"No row finished beside {reference}, so there is nothing to compare."
    told = " or ".join(map(str, sorted({p.n for p in pairs.values() if p.n < MIN_SEEDS})))
    if all(pair.n < MIN_SEEDS for pair in pairs.values()):
        return (
            f"Too few seeds in common with {reference} ({told}): "
            f"no difference can be told from noise with fewer than {MIN_SEEDS}."
        )
    better, worse = (_clauses(table, pairs, verdict) for verdict in VERBS)
    better = better or [
        f"No row beats {reference} on a steered metric by an interval that excludes zero"
    ]
    judged = {row for (row, _), pair in pairs.items() if pair.n >= MIN_SEEDS}
    others = [row for row in dict.fromkeys(row for row, _ in pairs) if row not in judged]
    caution = [f"Too few seeds ({told}) for a verdict on {listed(others)}"] if others else []
    return " ".join("; ".join(clauses) + "." for clauses in (better, worse, caution) if clauses)


def _clauses(table: Table, pairs: dict[tuple[str, str], Paired], verdict: str) -> list[str]:
    """One for all rows that have the verdict on the same metrics."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in table.rows[1:]:
        names = tuple(
            name
            for name in table.metrics
            if (row, name) in pairs and pairs[row, name].verdict == verdict
        )
        if names:
            rows.setdefault(names, []).append(row)
    one, many = VERBS[verdict]
    everything = f"all {len(table.metrics)} {'steered ' if table.side_effects else ''}metrics"
    return [
        f"{listed(group)} {many if len(group) > 1 else one} {table.reference} "
        f"on {everything if len(names) == len(table.metrics) > 1 else listed(names)}"
        for names, group in rows.items()
    ]
