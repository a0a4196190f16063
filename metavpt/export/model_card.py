"""The model card of exported weights: data, training and effect on the metrics."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from omegaconf import DictConfig, OmegaConf

from metavpt.cli.formatting import number
from metavpt.errors import reading
from metavpt.report import read_log, summary_rows

CARD = """\
---
{{ card_data }}
---
# {{ name }}

{{ about }}

In the folder of this card:

{{ usages }}

## Metrics

At step {{ first }} (before any training here) and at step {{ last }}. {{ measured }}

{{ metrics }}

## Training

{{ training }}

```
{{ command }}
```

```yaml
{{ config }}
```

## Versions

{{ versions }}

## Licence

{{ licence }}
"""
SECTIONS = ("problem", "data", "strategy", "budget", "seed")
NOT_VERSIONS = ("command", "seed")


class Usage(NamedTuple):
    """A library that it imports, and an expression that loads the model from the card's folder."""

    library: str
    expression: str


class Description(NamedTuple):
    """The parts of a card that depend on the kind of model: title, hub tag, text, training data."""

    name: str
    tag: str
    about: str
    measured: str
    data: list[str]
    licence: str
    usages: list[Usage]


def model_card(run: Path, config: DictConfig, of: Description) -> str:
    """Write the card in Markdown, from config.yaml, metrics.jsonl and environment.json of `run`."""
    file = run / "environment.json"
    with reading(f"{file}: cannot be read", "delete it: the card then names no versions"):
        environment = dict[str, Any](json.loads(file.read_text()) if file.is_file() else {})
    rows = summary_rows(read_log(run / "metrics.jsonl"))
    last = max((row.last_step for row in rows), default=0)
    lines = ["| metric | before | after | change |", "|---|---|---|---|"]
    lines += [
        f"| {row.name} | {number(row.first)} | {number(row.last)} | "
        f"{number(row.change, sign=True)} |"
        for row in rows
    ]
    training: Any = OmegaConf.masked_copy(config, [key for key in SECTIONS if key in config])
    card = ModelCard.from_template(
        ModelCardData(tags=[of.tag, "self-supervised", "metavpt"]),
        template_str=CARD,
        name=of.name,
        about=of.about,
        usages="\n\n".join(
            f"```python\nimport {usage.library}\n\nmodel = {usage.expression}\n```"
            for usage in (*of.usages, Usage("metavpt", 'metavpt.load(".")'))
        ),
        first=min((row.first_step for row in rows), default=0),
        last=last,
        measured=of.measured,
        metrics="\n".join(lines),
        training=_training(config, of.data, last),
        command=environment.get("command", "unknown"),
        config=OmegaConf.to_yaml(training).strip(),
        versions="\n".join(
            f"- {name}: {value}" for name, value in environment.items() if name not in NOT_VERSIONS
        ),
        licence=f"{of.licence} The data named above have their own licences. "
        "metavpt itself is under the MIT licence.",
    )
    return f"{str(card).rstrip()}\n"


def _training(config: DictConfig, data: list[str], last: int) -> str:
    lines = [f"- data: {line}" for line in data]
    lines.append(f"- strategy: `{config.strategy._target_}`")
    if estimator := config.strategy.get("estimator"):
        lines.append(f"- estimator: `{class_name(estimator)}`")
    limits = ", ".join(
        f"{value} {unit}"
        for unit, value in config.budget.items()
        if value is not None and unit != "_target_"
    )
    return "\n".join([*lines, f"- budget: {limits}; {last} steps taken", f"- seed: {config.seed}"])


def class_name(node: Any) -> str:
    """Return the class name in the `_target_` of a configuration node."""
    return str(node._target_).rpartition(".")[2]
