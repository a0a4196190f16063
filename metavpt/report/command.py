"""`python -m metavpt.report FOLDER...`: reports of runs and comparisons, or one table of all."""

import argparse
import gzip
import re
import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO

from metavpt.cli.one_line_errors import reporting
from metavpt.compare import results
from metavpt.data.archives import FREE, RATIO
from metavpt.errors import MetaVPTError, reading
from metavpt.report.comparison import write_comparison_report
from metavpt.report.run import write_report
from metavpt.report.table import table

LOGS = "logs.tar.gz"  # in place of the run folders of a comparison
MEMBER = re.compile(r"(?:rows/[\w=+-][\w.=+-]*|warm)/seed\d+/(?:metrics\.jsonl|config\.yaml)")
MAX_BYTES = 1_000_000_000


def write(folder: Path) -> Path:
    """Write report.html into the folder of a run or of a comparison.

    Args:
        folder: Holds metrics.jsonl (a run) or rows.jsonl (a comparison). The logs of a comparison
            may be packed into one archive, logs.tar.gz, instead of its run folders.

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
        copy = Path(place) / folder.resolve().name
        copy.mkdir()
        for name in (results.FILE, results.DIRECTIONS, "config.yaml", "environment.json"):
            if (folder / name).is_file():
                shutil.copy(folder / name, copy)
        _unpack(folder / LOGS, copy)
        return Path(shutil.copy(write_comparison_report(copy), folder / "report.html"))


def _unpack(path: Path, folder: Path) -> None:
    """Unpack the logs and configurations of rows, and refuse any other member."""
    most = min(MAX_BYTES, max(FREE, RATIO * path.stat().st_size))
    # Unpacked before it is read as a tar: one header may ask for any number of bytes.
    with reading(f"{path}: not a readable archive"), TemporaryFile() as whole:
        with gzip.open(path) as packed:
            _copy(packed, whole, most, path)
        whole.seek(0)
        num_bytes = 0
        with tarfile.open(fileobj=whole, mode="r:") as archive:
            for member in archive:
                if member.size < 0 or not (MEMBER.fullmatch(member.name) and member.isfile()):
                    raise MetaVPTError(f"{path}: {member.name!r} is not the log of a row")
                num_bytes += member.size  # of a sparse file, with what it leaves out
                _check_size(num_bytes, most, path)
                place = folder / member.name
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.extractfile(member) or BytesIO() as log, place.open("wb") as file:
                    shutil.copyfileobj(log, file)


def _copy(source: gzip.GzipFile, target: IO[bytes], most: int, path: Path) -> None:
    num_bytes = 0
    while part := source.read(2**20):
        num_bytes += len(part)
        _check_size(num_bytes, most, path)
        target.write(part)


def _check_size(num_bytes: int, most: int, path: Path) -> None:
    if num_bytes > most:
        raise MetaVPTError(f"{path}: unpacks to more than {most:,} bytes; get the file again")


def main() -> None:
    """Write the reports of the folders on the command line and print their paths, or a table."""
    parser = argparse.ArgumentParser("python -m metavpt.report")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--table", action="store_true", help="print one Markdown table of all runs, no reports"
    )
    parser.add_argument("--metrics", nargs="+", default=[], help="the columns of the table")
    arguments = parser.parse_intermixed_args()
    with reporting():
        if arguments.table:
            print(table(arguments.folders, arguments.metrics), end="")
            return
        for folder in arguments.folders:
            print(write(folder))
