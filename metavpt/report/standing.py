"""The table of a comparison for its page: results and costs, and differences to the reference."""

from collections.abc import Sequence
from typing import NamedTuple

from metavpt.compare.table import Cell, Section, Table
from metavpt.report.rows import Row


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


def standing(table: Table, rows: Sequence[Row]) -> Standing:
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
