"""The README of exported weights: what they were trained on, how, and what it changed."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import timm
from omegaconf import DictConfig, OmegaConf

from metavpt.numerals import number
from metavpt.report import read_log, summary_rows

CARD = """\
---
tags: [feature-extraction, self-supervised, metavpt]
---
# {name}, continued by metavpt ({part})

{about}

```python
{usages}
```

## Metrics

Frozen features of the student at step {first} (before any training here) and at step {last}.{side}

{metrics}

## Training

{training}

```
{command}
```

```yaml
{config}
```

## Versions

{versions}

## Licence

{licence}
"""
SECTIONS = ("problem", "data", "strategy", "budget", "seed")
NOT_VERSIONS = ("command", "seed")


class Usage(NamedTuple):
    """How the weights are read: a library, and the expression that gives the model from the folder of the card."""

    library: str
    expression: str


def model_card(run: Path, config: DictConfig, part: str, usages: list[Usage]) -> str:
    """Markdown, made of what `run` wrote: config.yaml, metrics.jsonl, environment.json."""
    file = run / "environment.json"
    environment: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    rows = summary_rows(read_log(run / "metrics.jsonl"))
    last = max((row.last_step for row in rows), default=0)
    lines = ["| metric | before | after | change |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {number(row.first)} | {number(row.last)} | {number(row.change, sign=True)} |" for row in rows]
    training: Any = OmegaConf.masked_copy(config, [key for key in SECTIONS if key in config])
    side = " The teacher, the student's moving average, was not measured." if part == "teacher" else ""
    return CARD.format(
        name=config.backbone.name,
        part=part,
        about=_about(config),
        usages="\n".join(f"model = {usage.expression}  # {usage.library}" for usage in usages),
        first=min((row.first_step for row in rows), default=0),
        last=last,
        side=side,
        metrics="\n".join(lines),
        training=_training(config, last),
        command=environment.get("command", "unknown"),
        config=OmegaConf.to_yaml(training).strip(),
        versions="\n".join(f"- {name}: {value}" for name, value in environment.items() if name not in NOT_VERSIONS),
        licence=_licence(config),
    )


def _about(config: DictConfig) -> str:
    backbone = config.backbone
    source = "random weights"
    if backbone.get("weights"):
        source = f"the weights of `{backbone.weights}`"
    elif backbone.get("pretrained"):
        source = f"timm's released weights `{backbone.name}`"
    return (
        f"The vision transformer `{backbone.name}` from {source}, trained on with `{_class(config.problem)}` on unlabelled images, "
        f"its tasks made by `{_class(config.strategy)}`."
    )


def _training(config: DictConfig, last: int) -> str:
    data: Any = config.get("data") or {}
    sets = {"": data} if "_target_" in data else data
    lines = [f"- data{f' {name}' if name else ''}: {_source(of)}" for name, of in sets.items()]
    lines.append(f"- strategy: `{config.strategy._target_}`")
    if estimator := config.strategy.get("estimator"):
        lines.append(f"- estimator: `{_class(estimator)}`")
    limits = ", ".join(f"{value} {unit}" for unit, value in config.budget.items() if value is not None and unit != "_target_")
    return "\n".join([*lines, f"- budget: {limits}; {last} steps taken", f"- seed: {config.seed}"])


def _source(data: Any) -> str:
    unlabelled = ", ".join(str(name) for name in data.get("unlabelled") or [])
    return f"{data.get('path') or 'generated rooms'}, unlabelled images from {unlabelled or 'the same'}"


def _class(node: Any) -> str:
    return str(node._target_).rpartition(".")[2]


def _licence(config: DictConfig) -> str:
    backbone = config.backbone
    if backbone.get("weights"):
        start = f"These weights derive from `{backbone.weights}`; the licence of that file holds for them too."
    elif backbone.get("pretrained"):
        known = timm.get_pretrained_cfg(backbone.name)
        licence = (known and known.license) or "see its page"
        start = f"These weights derive from `{backbone.name}`, whose licence holds for them too: {licence}."
    else:
        start = "These weights were trained from random ones, so no released weights restrict them."
    return f"{start} The data named above have licences of their own. metavpt itself is under the MIT licence."
