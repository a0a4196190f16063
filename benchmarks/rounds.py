"""Shared parts of `make bench`: rows in processes of their own, measured in interleaved rounds.

A slow minute of the machine so hits all rows alike, and ratios are taken within one run.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metavpt.errors import MetaVPTError

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
GPU_RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"  # of benchmarks/gpu.py
MIB = 2**20
SENTENCE = re.compile(r"(?<=\.) (?=[A-Z])")  # the space before one: a line each in the docs


class Row(NamedTuple):
    """What to time: `prepare` builds a call.

    `cycle` calls make one round, and the seconds are the mean per call. If the call has
    `figures()`, its numbers are added after time and memory are taken.
    """

    title: str
    prepare: Callable[[], Callable[[], Any]]
    cycle: int = 1
    least: int = 2  # cycles that are timed
    most: int = 5


@dataclass(frozen=True)
class Part:
    """One part of the benchmark: benchmarks/<name>.py with its results and its section of the docs.

    The results are in benchmarks/results/<name>.json, the section in docs/benchmarks.md.

    Attributes:
        default: The rows that are measured by default.
        packages: Packages whose versions are recorded.
        section: Turns the report into lines of Markdown.
    """

    name: str
    rows: Mapping[str, Row]
    default: Sequence[str]
    rounds: int
    packages: Sequence[str]
    setting: Mapping[str, str]
    section: Callable[[dict[str, Any]], list[str]]

    def main(self, about: str | None) -> None:
        parser = argparse.ArgumentParser(
            description=about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--rounds", type=int, default=self.rounds)
        parser.add_argument("--threads", type=int, default=2)
        known = ", ".join(self.rows)
        parser.add_argument(
            "--rows",
            nargs="+",
            choices=self.rows,
            default=self.default,
            metavar="ROW",
            help=f"some of {known}",
        )
        parser.add_argument(
            "--print", action="store_true", help="print the section and write nothing"
        )
        parser.add_argument("--measure", choices=self.rows, help=argparse.SUPPRESS)
        arguments = parser.parse_args()
        if not arguments.measure:
            self.measure_all(arguments)
            return
        try:
            print(json.dumps(measure(self.rows[arguments.measure], arguments.threads)))
        except MetaVPTError as error:
            sys.exit(str(error))

    def measure_all(self, arguments: argparse.Namespace) -> None:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.rows}
        for number in range(1, arguments.rounds + 1):
            for name in arguments.rows:
                runs[name].append(self.run(name, arguments.threads))
                print(f"round {number}/{arguments.rounds}  {name}  {runs[name][-1]}", flush=True)
            report = {
                "environment": self.environment(number, arguments.threads),
                "rows": {name: summary(runs[name]) for name in runs},
            }
            if not arguments.print:  # a run cut short keeps its whole rounds
                publish(self.name, report, self.section(report))
        if arguments.print:
            print("\n".join(self.section(report)))

    def run(self, row: str, threads: int) -> dict[str, Any]:
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / f"{self.name}.py"),
            "--measure",
            row,
            "--threads",
            str(threads),
        ]
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return {
                "error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[
                    -1
                ]
            }
        return json.loads(done.stdout.splitlines()[-1])

    def environment(self, rounds: int, threads: int) -> dict[str, Any]:
        return {
            "command": " ".join(["python", f"benchmarks/{self.name}.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "rounds": rounds,
            "threads": threads,
            "cpus": len(os.sched_getaffinity(0)),
            "cpu": cpu_name(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "versions": {package: _version(package) for package in self.packages},
            "setting": dict(self.setting),
        }


def publish(name: str, report: dict[str, Any], section: Sequence[str]) -> None:
    """Write the report to benchmarks/results/<name>.json and replace its section of the docs."""
    results = ROOT / "benchmarks" / "results" / f"{name}.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=1) + "\n")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = DOCUMENT.read_text() if DOCUMENT.exists() else "# Benchmarks\n"
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    head, rest = text.split(begin)
    lines = "\n".join(line if "|" in line else SENTENCE.sub("\n", line) for line in section)
    DOCUMENT.write_text(f"{head}{begin}\n{lines}\n{end}{rest.split(end)[1]}")


def publish_again(part: Part) -> None:
    """Write the section of a part from its stored results, with the rows of the GPU."""
    file = ROOT / "benchmarks" / "results" / f"{part.name}.json"
    if file.is_file():
        report = json.loads(file.read_text())
        publish(part.name, report, part.section(report))


class OnGPU(NamedTuple):
    """The rows that benchmarks/gpu.py measured of a part, and where.

    Attributes:
        rows: A summary of each.
        card: The name of the GPU; None if there is no row.
        sentence: Where and with what, or nothing.
    """

    rows: dict[str, dict[str, Any]]
    card: str | None
    sentence: str


def on_gpu(part: str, results: Path | None = None) -> OnGPU:
    """Read the rows of a part that benchmarks/gpu.py measured; the last result of each counts."""
    results = results or GPU_RESULTS
    lines = results.read_text().splitlines() if results.is_file() else []
    found = [line for line in map(json.loads, lines) if line["part"] == part]
    rows = {line["row"]: summary([line["run"]]) for line in found if "error" not in line["run"]}
    if not rows:
        return OnGPU({}, None, "")
    where = found[-1]["environment"]
    sentence = (
        f"Rows of a GPU: one round on {where['gpu']}, torch {where['torch']}, {where['date']}: "
        f"`{where['command']}`."
    )
    return OnGPU(rows, where["gpu"], sentence)


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in cpuinfo.open() if "model name" in line]
        if cpuinfo.exists()
        else []
    )
    return next(iter(models), platform.processor())


def measure(row: Row, threads: int) -> dict[str, Any]:
    """Measure a row in its own process: one call to warm up, then the median over 10 seconds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    call = row.prepare()
    before = peak_bytes() / MIB
    call()
    seconds: list[float] = []
    while len(seconds) < row.least or (sum(seconds) * row.cycle < 10 and len(seconds) < row.most):
        began = time.perf_counter()
        for _ in range(row.cycle):
            call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / row.cycle)
    peak = peak_bytes() / MIB
    taken = {
        "seconds": statistics.median(seconds),
        "peak_mib": peak,
        "mib_before": before,
        "grown_mib": peak - before,
        "calls": seconds,
    }
    return {**taken, **(call.figures() if hasattr(call, "figures") else {})}


def peak_bytes() -> int:
    """The GPU's allocations where one is in use, else the resident memory of the whole process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [run["error"] for run in runs if "error" in run]
    if errors:
        return {"error": errors[0], "runs": runs}
    values = {key: [run[key] for run in runs] for key in ("seconds", "peak_mib")}
    spread = {key: [min(numbers), max(numbers)] for key, numbers in values.items()}
    numbers = {key for key, value in runs[0].items() if isinstance(value, (int, float))}
    return {
        **{key: statistics.median(run[key] for run in runs) for key in sorted(numbers)},
        "spread": spread,
        "runs": runs,
    }


def machine(environment: dict[str, Any]) -> str:
    """Where and with what a report was measured, in one line."""
    return (
        f"{environment['cpus']} CPU cores ({environment['cpu']}), "
        f"{environment['threads']} threads, "
        + ", ".join(
            f"{name} {number or 'absent'}" for name, number in environment["versions"].items()
        )
        + f"; medians of {environment['rounds']} interleaved rounds, one process each, "
        "with the least and the greatest; "
        f"{environment['date']}: `{environment['command']}`."
    )


def cells(row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Seconds and peak MiB, each with its spread and with the ratio to `plain`."""
    found = []
    for key, digits in (("seconds", 3), ("peak_mib", 0)):
        low, high = row["spread"][key]
        ratio = f"{row[key] / plain[key]:.2f}" if key in plain else ""
        found += [f"{row[key]:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})", ratio]
    return found


KINDS = {
    "seconds": "time",
    "peak_mib": "memory",
    "grown_mib": "memory above what the process held before",
}


class Target(NamedTuple):
    """`key` of row `name` <= limit x that of row `over`."""

    key: str  # of KINDS
    name: str
    over: str
    limit: float


def verdicts(
    targets: Sequence[Target], measured: Mapping[str, dict[str, Any]], rows: Mapping[str, Row]
) -> list[str]:
    lines = ["| target | measured | |", "| --- | --- | --- |"]
    for key, name, over, limit in targets:
        if key in measured.get(name, {}) and key in measured.get(over, {}):
            ratio = measured[name][key] / measured[over][key]
            verdict = "met" if ratio <= limit else "**not met**"
            bound = f"{KINDS[key]} of {rows[name].title} <= {limit:g} x {rows[over].title}"
            lines.append(f"| {bound} | {ratio:.2f} | {verdict} |")
    return lines


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
