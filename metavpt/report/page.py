"""A report page: one file without scripts or links, rendered from a template."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from metavpt.cli.formatting import breakable, duration, hundredths, number, with_error
from metavpt.cli.yaml_size import check_yaml
from metavpt.report.svg import NUM_COLOURS, hue, turn
from metavpt.report.texts import visible
from metavpt.training.disk import write_text


def write(path: Path, template: str, **values: Any) -> Path:
    """Render `template` and write it to `path`.

    The page ends with config.yaml and environment.json of the same folder.

    Args:
        path: The path of the page.
        template: The name of a template in this folder.
        values: The variables of the template.

    Returns:
        `path`.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        function.__name__: function
        for function in (
            breakable,
            duration,
            hue,
            hundredths,
            number,
            turn,
            visible,
            with_error,
        )
    }
    templates.globals["num_colours"] = NUM_COLOURS
    folder = path.parent
    html = templates.get_template(template).render(
        folder=folder.resolve().name.encode(errors="replace").decode(),
        config=_text(folder / "config.yaml"),
        environment=environment(folder),
        **values,
    )
    write_text(path, html)  # whoever has the page open never reloads half of it
    return path


def configuration(folder: Path) -> dict[str, Any]:
    """Read config.yaml in `folder`. Empty if there is none."""
    return _parsed(_text(folder / "config.yaml"))


def environment(folder: Path) -> dict[str, Any]:
    """Read environment.json in `folder`. Empty if there is none."""
    return _parsed(_text(folder / "environment.json"))


def choice(config: Mapping[str, Any], axis: str) -> str:
    """Return the choice on a configuration axis: a class name, or a plain string."""
    chosen = config.get(axis, "")
    target = (
        chosen.get("name") or chosen.get("_target_", "") if isinstance(chosen, dict) else chosen
    )
    return str(target or "").rsplit(".")[-1]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def _parsed(text: str) -> dict[str, Any]:
    """Parse YAML or JSON. An unreadable file leaves its part of the page empty."""
    try:
        check_yaml(text)
        value = yaml.safe_load(text)
    except Exception:  # of the constructors too: 2026-99-99 is no date
        return {}
    return value if isinstance(value, dict) else {}
