"""The page of a comparison: differences to the reference, costs, and curves."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from metavpt.compare import results
from metavpt.compare.headline import headline
from metavpt.compare.paired_statistics import MIN_SEEDS
from metavpt.compare.table import STEP0, Cell, Section, Table
from metavpt.report import page
from metavpt.report.curves import Band, bands
from metavpt.report.first_order import PREDICTIONS, FirstOrder, first_order_chart
from metavpt.report.gallery import MAX_BYTES, Picture, gallery
from metavpt.report.logs import warnings
from metavpt.report.pareto import Point, pareto_axes, pareto_chart
from metavpt.report.progress import samples_to_reach
from metavpt.report.rows import Row, read_logs, read_rows, run_folder

NUM_PICTURES = 3  # of one name and row: the first, a middle and the last step
NUM_POINTS = 100  # of a curve of the designer's value
PURPOSES = {
    "learner": "learner",
    "designer": "designer updates",
    "task": "task construction",
    "data": "data",
    "probe": "probes",
}


class Line(NamedTuple):
    """A line of the table. Step 0 has no row."""

    name: str
    row: Row | None
    cell: Cell
    texts: list[str]


class Block(NamedTuple):
    """The lines of a metric. `scale` is the largest absolute end of an interval."""

    title: str
    lines: list[Line]
    scale: float


class Standing(NamedTuple):
    """The parts of a `Table` that the page shows.

    Attributes:
        header: Headings of the differences. Empty without a reference.
        steered: A block for each target metric.
        side_effects: A block for each side-effect metric.
        cost_header: Headings of the costs.
        costs: The costs of every finished row.
        notes: The notes of the table, without failed rows.
    """

    header: list[str]
    steered: list[Block]
    side_effects: list[Block]
    cost_header: list[str]
    costs: dict[str, list[str]]
    notes: list[str]


class Reached(NamedTuple):
    """Samples that each row needs to reach the final value of the reference.

    Attributes:
        name: The metric.
        rows: For each row, the samples and their share of the reference's samples. None: not
            reached.
    """

    name: str
    rows: dict[str, tuple[float, float] | None]


class Bar(NamedTuple):
    """Mean seconds of a row by purpose, and their total."""

    row: Row
    seconds: dict[str, float]
    total: float


def write_comparison_report(folder: Path, reference: str = "fixed") -> Path:
    """Write `folder`/report.html, one file without scripts or links.

    It is made from rows.jsonl, the run folders of the rows, and the warm starts.

    Args:
        folder: The folder of the comparison.
        reference: The row that differences are taken to.

    Returns:
        The path of the report.

    Raises:
        MetaVPTError: No row has finished or failed yet.
    """
    found = results.read(folder)
    table = Table(found, reference, results.read_directions(folder))
    rows = read_rows(folder, found, reference)
    config = page.configuration(folder)
    return page.write(
        folder / "report.html",
        "comparison.html.jinja",
        title=" · ".join(filter(None, (page.choice(config, "problem"), "comparison"))),
        headline=headline(table),
        summary=table.summary(),
        matched=_matched(folder, rows, config),
        table=table,
        min_seeds=MIN_SEEDS,
        rows=rows,
        standing=_standing(table, rows),
        seeds=sorted({result.seed for result in found}),
        failed=[result for result in found if result.error is not None],
        curves=list(_curves(table, rows)),
        reached=list(_reached(table, rows)),
        front=_front(table, rows),
        first_orders=_first_orders(rows),
        predictions=PREDICTIONS,
        values=list(_values(rows)),
        bars=_bars(rows),
        purposes=PURPOSES,
        pictures=_pictures(folder, rows),
        warnings=warnings(
            {f"warm start, seed {seed}": log for seed, log in read_logs(folder / "warm").items()}
            | {f"{row.name}, seed {seed}": log for row in rows for seed, log in row.logs.items()}
        ),
    )


def _standing(table: Table, rows: Sequence[Row]) -> Standing:
    """Return the paired differences of all rows to the reference, one block for each metric."""
    *metrics, cost = table.sections()
    blocks = [
        _block(table, rows, name, section)
        for name, section in zip((*table.metrics, *table.side_effects), metrics, strict=True)
    ]
    failures = tuple(
        f"{result.row} failed on seed {result.seed}:"
        for result in table.results
        if result.error is not None
    )
    return Standing(
        header=metrics[0].header[2:] if metrics else [],
        steered=blocks[: len(table.metrics)],
        side_effects=blocks[len(table.metrics) :],
        cost_header=cost.header[1:],
        costs={name: texts for name, *texts in cost.lines},
        notes=[note for note in table.notes if not note.startswith(failures)],
    )


def _block(table: Table, rows: Sequence[Row], metric: str, section: Section) -> Block:
    by_name = {row.name: row for row in rows}
    others = [line for line in section.lines if line[0] != table.reference]
    lines = [
        Line(name, by_name.get(name), table.cells[name, metric], texts)
        for name, _, *texts in others
    ]
    pairs = [line.cell.paired for line in lines if line.row and line.cell.paired]
    ends = [
        abs(end)
        for pair in pairs
        for end in (pair.low, pair.high, pair.difference)
        if end is not None
    ]
    return Block(section.title, lines, max(ends, default=0.0))


def _matched(folder: Path, rows: list[Row], config: dict[str, Any]) -> str | None:
    """Return the budget unit that all rows share. None: budgets differ, or one is unknown."""
    unit, limits = config.get("match"), set[str]()
    for row in rows:
        for result in row.results[:1]:
            budget = page.configuration(run_folder(folder, row.name, result.seed)).get("budget")
            if not isinstance(budget, dict):
                return None
            limits.add(str(budget.get(unit)))
    return unit if len(limits) == 1 else None


def _curves(table: Table, rows: list[Row]) -> Iterator[tuple[str, Markup]]:
    for i, name in enumerate((*table.metrics, *table.side_effects)):
        lines = [Band(row.colour, *course) for row in rows if (course := row.course(name))]
        lines.sort(key=lambda line: line.row == 0)  # the reference on top
        if lines:
            yield name, bands(lines, f"metric{i}", "samples")


def _reached(table: Table, rows: list[Row]) -> Iterator[Reached]:
    """Compare every row with the reference on the seeds that both have.

    Only for metrics that were measured between start and end, and on which the reference improves
    on step 0. Otherwise step 0 already reaches the final value of the reference.
    """
    reference = next((row for row in rows if row.name == table.reference), None)
    for name in filter(table.sign, (*table.metrics, *table.side_effects)):
        gain = table.difference(table.reference, STEP0, name)
        if gain is None or gain.sign * gain.difference <= 0:
            continue
        if gain.low is not None and gain.high is not None and gain.low <= 0 <= gain.high:
            continue
        samples = {}
        for row in rows:
            seeds = (
                {result.seed for result in row.results}
                & {result.seed for result in reference.results}
                if reference
                else set()
            )
            course, last = (one.course(name, seeds) if one else None for one in (row, reference))
            if course and last and len(last.samples) > 2:  # else a line between start and end
                at = samples_to_reach(course, float(last.mean[-1]), table.sign(name))
                samples[row.name] = None if at is None else (at, at / last.samples[-1])
        if samples:
            yield Reached(name, samples)


def _front(table: Table, rows: list[Row]) -> Markup | None:
    """Plot two target metrics against each other, for three rows or more."""
    axes = pareto_axes(_unlike([name for name in table.metrics if table.sign(name)], table))
    if axes is None:
        return None
    points = []
    for row in rows:
        x, y = (table.cells[row.name, name].mean for name in axes)
        if x and y:
            points.append(Point(row.colour, row.name, x.value, y.value, x.se or 0.0, y.se or 0.0))
    if len(points) < 3:
        return None
    x, y = axes
    return pareto_chart(points, (x, table.sign(x)), (y, table.sign(y)), "front")


def _unlike(metrics: Sequence[str], table: Table) -> list[str]:
    """Leave out metrics that are equal to an earlier one in every row."""
    found: dict[tuple[Any, ...], str] = {}
    for name in metrics:
        found.setdefault(tuple(table.cells[row, name].mean for row in table.rows), name)
    return list(found.values())


def _first_orders(rows: list[Row]) -> list[tuple[Row, dict[str, FirstOrder], Markup]]:
    """Return each row with its pooled predictions by name, and the scatter plot of the first."""
    found = [(row, row.first_orders()) for row in rows]
    return [
        (
            row,
            {one.name: one for one in pooled},
            first_order_chart(pooled[0], f"firstorder{row.colour}", row.colour),
        )
        for row, pooled in found
        if pooled
    ]


def _values(rows: list[Row]) -> Iterator[tuple[Row, Markup]]:
    for row in rows:
        value = row.value()
        if value and len(value.samples) > 1:
            yield (
                row,
                bands(
                    [Band(row.colour, *value.thinned(NUM_POINTS))],
                    f"value{row.colour}",
                    "steps",
                    small=True,
                ),
            )


def _bars(rows: list[Row]) -> list[Bar]:
    found = {row.name: row.times() for row in rows}
    order = list(
        dict.fromkeys([*PURPOSES, *(purpose for times in found.values() for purpose in times)])
    )
    bars = [
        Bar(
            row,
            {name: found[row.name].get(name, 0.0) for name in order},
            sum(found[row.name].values()),
        )
        for row in rows
    ]
    return [bar for bar in bars if bar.total > 0]


def _pictures(folder: Path, rows: list[Row]) -> dict[str, list[tuple[Row, list[Picture]]]]:
    """Return the pictures of every row's first seed by name. Rows share the size limit equally."""
    found: dict[str, list[tuple[Row, list[Picture]]]] = {}
    for row in rows:
        if row.results:
            figures = run_folder(folder, row.name, row.results[0].seed) / "figures"
            for name, pictures in gallery(
                figures, NUM_PICTURES, MAX_BYTES / len(rows)
            ).groups.items():
                found.setdefault(name, []).append((row, pictures))
    return found
