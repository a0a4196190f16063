"""HTML reports of a run and of a comparison."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metavpt.report.comparison import write_comparison_report
    from metavpt.report.logs import Record, read_log, series_of
    from metavpt.report.run import SummaryRow, summary_rows, write_report

__all__ = [
    "Record",
    "SummaryRow",
    "read_log",
    "series_of",
    "summary_rows",
    "write_comparison_report",
    "write_report",
]

# Imported when first used: `python -m metavpt.report` must be able to say that an extra is missing.
HOMES = {
    "Record": "logs",
    "SummaryRow": "run",
    "read_log": "logs",
    "series_of": "logs",
    "summary_rows": "run",
    "write_comparison_report": "comparison",
    "write_report": "run",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
