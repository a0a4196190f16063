"""The results of a comparison in a few sentences, the target metric first."""

from metavpt.cli.formatting import listed, number
from metavpt.compare.paired_statistics import MIN_SEEDS, Paired
from metavpt.compare.table import Table

VERBS = {"better": ("beats", "beat"), "worse": ("is worse than", "are worse than")}


def headline(table: Table) -> str:
    """Summarise the effect of steering on the target metric, then that of the controls.

    If the results do not state which rows were steered, only rows that beat the reference are
    named.
    """
    found = [_outcome(table), _labels_alone(table), _share(table), _trivial(table), _ranking(table)]
    return " ".join(filter(None, found))


def _best(table: Table) -> tuple[str, Paired] | None:
    """Return the steered row with the largest gain over the reference on the target metric."""
    if table.target is None:
        return None
    gains = [
        (row, pair)
        for row in table.designed
        if row != table.reference and (pair := table.cells[row, table.target].paired)
    ]
    return max(gains, key=lambda item: item[1].sign * item[1].difference, default=None)


def _outcome(table: Table) -> str | None:
    found = _best(table)
    if found is None:
        return None
    (row, pair), target, reference = found, table.target, table.reference
    mean = table.cells[row, target or ""].mean
    by = f"{number(pair.difference, sign=True)} to {number(mean.value if mean else None)}"
    if pair.verdict == "too few seeds":
        way = "ahead of" if pair.sign * pair.difference > 0 else "not ahead of"
        ends = "" if pair.low is None else f" (range of the seeds [{', '.join(_ends(pair))}])"
        return (
            f"Too few seeds for a verdict, {pair.n} of at least {MIN_SEEDS}: the best steered row, "
            f"{row}, is {way} {reference} on {target}, {by}{ends}."
        )
    seeds = f"{pair.n} seeds, 95% interval [{', '.join(_ends(pair))}]"
    if pair.verdict == "better":
        return f"{row} is better than {reference} on {target}: {by} ({seeds})."
    if pair.verdict == "worse":
        return (
            f"Every steered row is worse than {reference} on {target}; "
            f"the best, {row}: {by} ({seeds})."
        )
    return (
        f"No steered row is better than {reference} on {target} by an interval that excludes zero; "
        f"the best, {row}: {by} ({seeds})."
    )


def _labels_alone(table: Table) -> str | None:
    """Report that labels alone, or the learner at step 0, are better than every steered row."""
    found, target = _best(table), table.target
    if found is None or target is None:
        return None
    said = []
    for row, what in (("labels_only", "Labels alone are"), ("step 0", "The learner at step 0 is")):
        pairs = [pair for other in table.designed if (pair := table.difference(row, other, target))]
        if not pairs or not all(pair.sign * pair.difference > 0 for pair in pairs):
            continue
        verdicts = {pair.verdict for pair in pairs}
        doubt = "" if verdicts == {"better"} else ", not by more than every interval"
        doubt = "" if "too few seeds" in verdicts else doubt  # _outcome says so
        own, best = (table.cells[name, target].mean for name in (row, found[0]))
        values = (
            f"{number(own.value if own else None)} against {number(best.value if best else None)}"
        )
        said.append(
            f"{what} better than every steered row on {target}: {values} of {found[0]}{doubt}."
        )
    return " ".join(said) or None


def _share(table: Table) -> str | None:
    found, target = _best(table), table.target
    share = table.share_of_direct(found[0], target) if found and target else None
    if found is None or share is None or share <= 0:
        return None
    return (
        f"{found[0]} has {share:.0%} of the gain of direct, which trains on the labels themselves."
    )


def _trivial(table: Table) -> str | None:
    """List the rows that are no better than a prediction that ignores the input."""
    target = table.target
    known = [
        (mean.value, name)
        for name in table.trivial
        if target and (mean := table.cells[name, target].mean)
    ]
    if target is None or not known:
        return None
    sign = table.sign(target)
    value, name = max(known, key=lambda item: sign * item[0])
    rows = {row: mean for row in table.trained if (mean := table.cells[row, target].mean)}
    beaten = [row for row, mean in rows.items() if sign * (mean.value - value) <= 0]
    if not beaten:
        return None
    if len(beaten) == len(rows):
        return f"No row is better than the {name} ({number(value)})."
    verb = "is" if len(beaten) == 1 else "are"
    return f"{listed(beaten)} {verb} no better than the {name} ({number(value)})."


def _ends(pair: Paired) -> list[str]:
    return [number(end, sign=True) for end in (pair.low, pair.high)]


def _ranking(table: Table) -> str | None:
    """List the rows that are better or worse than the reference on a target metric.

    A verdict needs an interval that excludes zero. None: too few seeds, which `_outcome` says.
    """
    reference = table.reference
    if not table.has_reference:
        return f"No finished row {reference}, so there is nothing to compare with."
    pairs = {
        (row, name): pair
        for row in table.trained
        for name in table.metrics
        if name in table.steered[row] and (pair := table.cells[row, name].paired)
    }
    if not pairs:
        return f"No row finished beside {reference}, so there is nothing to compare."
    told = " or ".join(map(str, sorted({p.n for p in pairs.values() if p.n < MIN_SEEDS})))
    if all(pair.n < MIN_SEEDS for pair in pairs.values()):
        if _best(table):
            return None
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
    """Write one clause for all rows that have the verdict on the same metrics."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in table.trained:
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
