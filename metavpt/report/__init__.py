"""HTML reports of a run and of a comparison."""

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
