"""Write the table of dependencies in docs/licences.md: `python docs/licences.py`."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

DOCS = Path(__file__).parent
BEGIN, END = "<!-- dependencies: begin -->", "<!-- dependencies: end -->"


def declared() -> dict[str, list[str]]:
    """Package -> the groups of pyproject.toml that ask for it."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    found: dict[str, list[str]] = {}
    for group, requirements in [
        ("core", project["dependencies"]),
        *project["optional-dependencies"].items(),
    ]:
        for requirement in requirements:
            name = re.split(r"[^\w.-]", requirement)[0]
            if name != project["name"]:
                found.setdefault(name, []).append(group)
    return found


def licence(name: str) -> tuple[str, str]:
    """Return version and licence as the package states them: expression, classifiers or field."""
    about = metadata.metadata(name)
    classifiers = [
        line.split("::")[-1].strip()
        for line in about.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    stated = (about.get("License") or "not stated").strip().splitlines()[0]
    return about["Version"], about.get("License-Expression") or ", ".join(classifiers) or stated


def table() -> str:
    rows = ["| package | asked for by | version | licence |", "|---|---|---|---|"]
    for name, groups in sorted(
        declared().items(), key=lambda item: ("core" not in item[1], item[0].lower())
    ):
        rows.append(f"| {name} | {', '.join(groups)} | {' | '.join(licence(name))} |")
    return "\n".join(rows)


if __name__ == "__main__":
    page = DOCS / "licences.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")
