"""The table of a comparison for a terminal, as Markdown and as CSV."""

import csv
import io
import re
from pathlib import Path

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from metavpt.compare.headline import headline
from metavpt.compare.table import Cost, Table
from metavpt.training.disk import write_text

COLUMNS = (  # of the CSV
    *("row", "metric", "block", "mean", "se", "seeds"),
    *("difference", "low", "high", "p", "wins", "n", "verdict"),
)
STYLES = {"better": "green", "worse": "red"}


def rich(table: Table) -> Group:
    """Render for a terminal of 100 columns. A difference with a verdict is green or red."""
    parts: list[RichTable | Text] = [Text(headline(table)), Text()]
    summary = table.summary()
    for section in [*([summary] if summary else []), *table.sections()]:
        made = RichTable(box=None, header_style="dim", pad_edge=False)
        for i, name in enumerate(section.header):
            made.add_column(
                name,
                justify="right" if i else "left",
                no_wrap=i > 0 and name != "other metrics",
                overflow="fold",
            )
        for line, verdict in zip(section.lines, section.verdicts, strict=True):
            made.add_row(
                *(
                    Text(text, STYLES.get(verdict, "") if i == 2 else "")
                    for i, text in enumerate(line)
                )
            )
        parts += [Text(section.title, "bold"), made, Text()]
    parts += [Text(f"warning: {warning}", "yellow") for warning in table.warnings]
    return Group(*parts, *(Text(note, "dim") for note in table.notes))


def markdown(table: Table) -> str:
    """Render as Markdown."""
    parts = [_escaped(headline(table))]
    summary = table.summary()
    for section in [*([summary] if summary else []), *table.sections()]:
        rule = ["---", *["---:"] * (len(section.header) - 1)]
        lines = [section.header, rule, *section.lines]
        parts.append(
            f"**{_escaped(section.title)}**\n\n"
            + "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)
        )
    closing = [
        *(f"- **Warning:** {_escaped(text)}" for text in table.warnings),
        *(f"- {_escaped(note)}" for note in table.notes),
    ]
    return "\n\n".join([*parts, "\n".join(closing)]).rstrip() + "\n"


def comma_separated(table: Table) -> str:
    """Render one line for each row and metric, in full precision.

    Unknown values are empty. `n` counts the seeds of the difference.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*COLUMNS, *Cost._fields[1:]])
    for name in (*table.metrics, *table.side_effects):
        block = "steered" if name in table.metrics else "side effect"
        for row in table.rows:
            mean, against = table.cells[row, name]
            means = [mean.value, mean.se, mean.n] if mean else [None, None, 0]
            pairs = [*against[:6], against.verdict] if against else [None] * 7
            writer.writerow([row, name, block, *means, *pairs, *table.cost(row)[1:]])
    return file.getvalue()


def write(table: Table, folder: Path) -> None:
    """Write table.md and table.csv to `folder`, each at once."""
    for name, text in (("table.md", markdown(table)), ("table.csv", comma_separated(table))):
        write_text(folder / name, text)


def _escaped(text: str) -> str:
    return re.sub(r"([\\|<>*`])", r"\\\1", text)
