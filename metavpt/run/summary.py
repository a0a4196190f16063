"""A summary of a run for the terminal."""

from pathlib import Path
from statistics import fmean

from rich.table import Table
from rich.text import Text

from metavpt.cli.formatting import number
from metavpt.report import Record, read_log, series_of, summary_rows
from metavpt.report.run import steering
from metavpt.training.budget import UNCOUNTED


def table(folder: Path) -> Table:
    """Compare step 0 with the last step for every metric of the run in `folder`."""
    records = read_log(folder / "metrics.jsonl")
    rows = summary_rows(records)
    first = min((row.first_step for row in rows), default=0)
    last = max((row.last_step for row in rows), default=0)
    made = Table(
        "metric",
        box=None,
        header_style="dim",
        caption=Text("\n".join(spending(records))),
        caption_justify="left",
    )
    for title in (f"step {first}", f"step {last}", "change", ""):
        made.add_column(title, justify="right")
    for row in rows:
        verdict = Text({True: "better", False: "worse", None: ""}[row.better])
        made.add_row(
            Text(row.name),
            number(row.first),
            number(row.last),
            number(row.change, sign=True),
            verdict,
        )
    return made


def spending(records: list[Record]) -> list[str]:
    """Describe steering, the value V, throughput and time shares, one line each.

    V is the mean over the first and over the last quarter of the designer's updates.
    """
    lines = [f"steering: {line}" for line in steering(records)]
    values = list(series_of(records, "designer").get("value", {}).values())
    if values:
        quarter = max(1, len(values) // 4)
        lines.append(
            f"value V: {fmean(values[:quarter]):+.3g} -> {fmean(values[-quarter:]):+.3g} over "
            f"{len(values)} designer updates"
        )
    throughput = list(series_of(records, "train").get("samples_per_s", {}).values())
    if throughput:
        lines.append(f"throughput: {throughput[-1]:.0f} samples/s")
    times = next(
        (record["seconds"] for record in reversed(records) if record.get("kind") == "time"), {}
    )
    training = {purpose: seconds for purpose, seconds in times.items() if purpose not in UNCOUNTED}
    total = sum(training.values())
    if total:
        shares = sorted(training.items(), key=lambda item: -item[1])
        names = {"designer": "designer updates", "task": "task construction"}
        lines.append(
            "training time: "
            + ", ".join(
                f"{names.get(purpose, purpose)} {seconds / total:.0%}"
                for purpose, seconds in shares
            )
        )
    return lines
