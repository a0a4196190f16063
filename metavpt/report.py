"""One static page for a run folder: what the learner was worth before and after, and how it got there."""

import base64
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from metavpt.curves import curve
from metavpt.errors import MetaVPTError

Record = dict[str, Any]
Series = dict[str, dict[int, float]]  # name -> step -> value

MAX_IMAGE_BYTES = 9_000_000  # of PNG files; 12 MB in base64, so the page stays below 15 MB
MAX_STEPS_SHOWN = 8  # pictures of one name
MAX_WARNINGS = 50
LOWER_IS_BETTER = re.compile(r"(^|_)(rmse|rel|mae|loss|nll|error|perplexity)(_|$)")
HIGHER_IS_BETTER = re.compile(r"(^|_)(delta\d|miou|iou|acc|accuracy|map|recall)(_|$)")
COUNTERS = ("samples", "grad_evals", "seconds")  # of a train record: totals, which as a curve are a straight line


class SummaryRow(NamedTuple):
    """One probe metric at the first and at the last step that has it; `last` is None where that is the same step."""

    name: str
    first_step: int
    first: float
    last_step: int
    last: float | None

    @property
    def change(self) -> float | None:
        return None if self.last is None else self.last - self.first

    @property
    def percent(self) -> float | None:
        return None if not self.change or not self.first else 100 * self.change / abs(self.first)

    @property
    def better(self) -> bool | None:
        """None: no change, not finite, or nobody said which way is good."""
        metric = self.name.rsplit("/")[-1]
        lower, higher = LOWER_IS_BETTER.search(metric), HIGHER_IS_BETTER.search(metric)
        if not self.change or not math.isfinite(self.change) or not (lower or higher):
            return None
        return (self.change < 0) == bool(lower)


class Picture(NamedTuple):
    step: int
    source: str  # data URI
    wide: bool


class Pictures(NamedTuple):
    """Pictures by name, steps in order, and how many of the folder's are not on the page."""

    groups: dict[str, list[Picture]]
    num_left_out: int


def read_log(path: Path) -> list[Record]:
    """The records of metrics.jsonl. The last line of a killed run is cut short and skipped; any other bad line becomes a warning."""
    if not path.is_file():
        raise MetaVPTError(f"{path}: no such log; give the folder of a run (it holds metrics.jsonl)")
    lines = path.read_text(errors="replace").splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip() and number < len(lines):
            records.append({"kind": "warning", "message": f"{path.name} line {number} cannot be read and was left out"})
    return records


def series_of(records: list[Record], kind: str) -> Series:
    """Every number of the records of `kind` by name and step; where a step was logged twice the later record holds."""
    series: Series = {}
    for record in records:
        if record.get("kind") != kind or not _is_number(record.get("step")):
            continue
        values = record.get("metrics", {}) if kind == "probe" else record
        for name, value in values.items():
            if _is_number(value) and name != "step":
                series.setdefault(name, {})[int(record["step"])] = float(value)
    return series


def summary_rows(records: list[Record]) -> list[SummaryRow]:
    """Step 0 against the last step for every probe metric, in the order of the log."""
    rows = []
    for name, values in series_of(records, "probe").items():
        first, last = min(values), max(values)
        rows.append(SummaryRow(name, first, values[first], last, values[last] if last > first else None))
    return rows


def write_report(run_folder: Path) -> Path:
    """`run_folder`/report.html: one file without scripts or links, made of metrics.jsonl, figures/, config.yaml and environment.json.

    Raises MetaVPTError where the folder has no log or the log no record.
    """
    records = read_log(run_folder / "metrics.jsonl")
    if not records:
        raise MetaVPTError(f"{run_folder / 'metrics.jsonl'}: nothing has been logged yet, so there is nothing to report")
    config_text = _text(run_folder / "config.yaml")
    config = _parsed(config_text)
    page = _environment().get_template("report.html.jinja")
    html = page.render(
        title=" · ".join(_choice(config, axis) for axis in ("problem", "strategy") if _choice(config, axis)) or run_folder.resolve().name,
        folder=run_folder.resolve().name,
        status=_status(records, config),
        spent=_spent(records),
        rows=summary_rows(records),
        curves=list(_curves(records)),
        pictures=_pictures(run_folder / "figures"),
        times=_times(records),
        warnings=_warnings(records),
        config=config_text,
        environment=_parsed(_text(run_folder / "environment.json")),
    )
    path = run_folder / "report.html"
    unfinished = path.with_suffix(".html.tmp")
    unfinished.write_text(html)
    os.replace(unfinished, path)  # whoever has the page open never reloads half of it
    return path


def number(value: float | None, sign: bool = False) -> str:
    """Four significant digits, or three and a sign for a change; a true minus, a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:+.3g}" if sign and value else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def breakable(name: str) -> Markup:
    """A long metric name that a narrow screen may break after / and _."""
    return Markup("").join(escape(part) + Markup("<wbr>") for part in re.split(r"(?<=[/_])", name))


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "duration": duration, "breakable": breakable}
    return environment


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _parsed(text: str) -> dict[str, Any]:
    """JSON is YAML too. What cannot be read leaves its part of the page empty: the run's numbers matter more than its labels."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _choice(config: Mapping[str, Any], axis: str) -> str:
    """What was chosen on a configuration axis: its class, or its name where it is a plain string."""
    choice = config.get(axis, "")
    target = choice.get("name") or choice.get("_target_", "") if isinstance(choice, dict) else choice
    return str(target or "").rsplit(".")[-1]


def _spent(records: list[Record]) -> dict[str, float]:
    """Steps of the last record that has one, and the totals of the last train record."""
    spent = {"steps": float(max((r["step"] for r in records if _is_number(r.get("step"))), default=0))}
    last = next((record for record in reversed(records) if record.get("kind") == "train"), {})
    return spent | {name: float(last[name]) for name in COUNTERS if _is_number(last.get(name))}


def _status(records: list[Record], config: Mapping[str, Any]) -> str:
    """`finished` once a limit of the budget is reached, else how far the run has come."""
    spent, budget = _spent(records), config.get("budget")
    limits = {unit: limit for unit, limit in budget.items() if _is_number(limit)} if isinstance(budget, dict) else {}
    if any(unit in spent and spent[unit] >= limit for unit, limit in limits.items()):
        return "finished"
    share = max((spent.get(unit, 0.0) / limit for unit, limit in limits.items() if limit), default=None)
    return f"step {spent['steps']:,.0f}" + (f", {share:.0%} of the budget" if share is not None else "")


def _curves(records: list[Record]) -> Iterator[tuple[str, list[tuple[str, float, Markup]]]]:
    """Heading and curves (name, last value, svg) of each group that has any."""
    headings = {"probe": "Probes", "designer": "Task designer", "train": "Pretraining"}
    for kind, heading in headings.items():
        series = {name: values for name, values in series_of(records, kind).items() if kind != "train" or name not in COUNTERS}
        if series:
            curves = [(name, values[max(values)], curve(values, f"{kind}{i}")) for i, (name, values) in enumerate(series.items())]
            yield heading, curves


def _pictures(folder: Path) -> Pictures:
    """figures/<name>-step<N>.png by name. Beyond the bound on bytes middle steps go first, then whole names."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("*.png")):
        match = re.fullmatch(r"(.+)-step(\d+)", path.stem)
        if match and _is_readable(path):
            found.setdefault(match[1], {})[int(match[2])] = path
    count = MAX_STEPS_SHOWN
    while count > 2 and _num_bytes(found, count) > MAX_IMAGE_BYTES:
        count -= 1
    groups, room = {}, MAX_IMAGE_BYTES
    for name in found:
        steps = _spread(found[name], count)
        room -= sum(path.stat().st_size for _, path in steps)
        if room >= 0:
            groups[name] = [_picture(step, path) for step, path in steps]
    return Pictures(groups, sum(map(len, found.values())) - sum(map(len, groups.values())))


def _num_bytes(found: dict[str, dict[int, Path]], count: int) -> int:
    return sum(path.stat().st_size for paths in found.values() for _, path in _spread(paths, count))


def _spread(paths: dict[int, Path], count: int) -> list[tuple[int, Path]]:
    """`count` of the steps with their files at even distances, the first and the last among them."""
    steps = sorted(paths.items())
    return [steps[i] for i in sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(count, len(steps)))})]


def _is_readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):  # Pillow's word for a PNG that a killed run left half written
        return False
    return True


def _picture(step: int, path: Path) -> Picture:
    with Image.open(path) as image:
        wide = image.width > 1.8 * image.height
    return Picture(step, "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(), wide)


def _times(records: list[Record]) -> list[tuple[str, float, float]]:
    """(purpose, seconds, share) from the last time record, which holds totals; largest first."""
    last = next((record for record in reversed(records) if record.get("kind") == "time"), {})
    seconds = last.get("seconds")
    spent = {name: float(value) for name, value in seconds.items() if _is_number(value)} if isinstance(seconds, dict) else {}
    total = sum(spent.values())
    return [(name, value, value / total) for name, value in sorted(spent.items(), key=lambda item: -item[1])] if total > 0 else []


def _warnings(records: list[Record]) -> list[tuple[str, int, str]]:
    """(message, how often, steps) of the different warnings, oldest first."""
    steps: dict[str, list[Any]] = {}
    for record in records:
        if record.get("kind") == "warning":
            steps.setdefault(str(record.get("message", "")), []).append(record.get("step"))
    ends = {message: [f"{step}" for step in (at[0], at[-1]) if step is not None] for message, at in steps.items()}
    return [(message, len(at), " to ".join(dict.fromkeys(ends[message]))) for message, at in steps.items()][:MAX_WARNINGS]
