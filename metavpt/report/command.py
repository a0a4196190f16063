"""`python -m metavpt.report FOLDER...`: write report.html of runs and comparisons anew from their logs."""

import shutil
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from metavpt.cli.one_line_errors import reporting
from metavpt.compare import results
from metavpt.errors import MetaVPTError
from metavpt.report.comparison import write_comparison_report
from metavpt.report.run import write_report

LOGS = "logs.tar.gz"  # rows/<row>/seed<k>/metrics.jsonl of a comparison that is kept without its run folders
USAGE = "usage: python -m metavpt.report FOLDER [FOLDER ...]"


def write(folder: Path) -> Path:
    """Write report.html into the folder of a run or of a comparison.

    Args:
        folder: holds metrics.jsonl (a run) or rows.jsonl (a comparison). The logs of a comparison
            may lie in one archive, logs.tar.gz, in place of its run folders.

    Returns:
        The path of the report.

    Raises:
        MetaVPTError: `folder` holds neither, or its archive is damaged.
    """
    if not (folder / results.FILE).is_file():
        return write_report(folder)
    if not (folder / LOGS).is_file():
        return write_comparison_report(folder)
    with TemporaryDirectory() as place:
        unpacked = Path(place) / folder.resolve().name
        shutil.copytree(folder, unpacked)
        try:
            with tarfile.open(unpacked / LOGS) as archive:
                archive.extractall(unpacked, filter="data")
        except (tarfile.TarError, EOFError, OSError) as error:
            raise MetaVPTError(f"{folder / LOGS}: not a readable archive ({error})") from None
        return Path(shutil.copy(write_comparison_report(unpacked), folder / "report.html"))


def main() -> None:
    """Write the reports of the folders on the command line and print their paths."""
    folders = sys.argv[1:]
    if not folders or {"-h", "--help"} & set(folders):
        print(USAGE)
        sys.exit(0 if folders else 2)
    with reporting():
        for folder in folders:
            print(write(Path(folder)))
