"""Everything that README and docs/ ask users to run is valid: blocks, commands, choices, links."""

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from metavpt.compare import command, results

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    DOCS / "results" / "README.md",
]
FENCE = re.compile(
    r"(?:<!-- test: (?P<mark>\w+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*python (?:-m metavpt\.\w+|examples/\S+|docs/\S+|benchmarks/\S+)"
)
BLOCKS = [
    (page, match["language"], match["text"], match["mark"])
    for page in PAGES
    for match in FENCE.finditer(page.read_text())
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LAUNCHERS = {
    "local": "hydra_plugins.hydra_joblib_launcher",
    "slurm": "hydra_plugins.hydra_submitit_launcher",
    "slurm_gpus": "hydra_plugins.hydra_submitit_launcher",
    "cluster_ray": "hydra_plugins.hydra_ray_launcher",
}


def lines_of(text: str) -> list[list[str]]:
    """The commands of a shell block, a backslash joining lines, each split into its words."""
    joined = text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


SHELL = [
    (page, words, mark)
    for page, language, text, mark in BLOCKS
    if language in ("sh", "")
    for words in lines_of(text)
]
INLINE = [
    (page, span)
    for page in PAGES
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
]
COMMANDS = [
    (page, words)
    for page, words, _ in SHELL
    if words[:2] == ["python", "-m"] and words[2].startswith("metavpt.")
]
COMMANDS += [
    (page, shlex.split(span))
    for page, span in INLINE
    if span.startswith("python -m metavpt.") and "=" in span
]
COMMANDS = list(
    {tuple(words): (page, words) for page, words in COMMANDS}.values()
)  # many stand in the README and in a page


def named(cases: list) -> list:
    return [pytest.param(*case, id=f"{case[0].stem}-{number}") for number, case in enumerate(cases)]


def test_blocks_are_in_languages_that_are_tested() -> None:
    assert COMMANDS
    assert {"python"} <= {language for _, language, _, _ in BLOCKS} <= {"python", "sh", "yaml", ""}


@pytest.mark.parametrize(
    ("page", "text"),
    named([(page, text) for page, language, text, _ in BLOCKS if language == "python"]),
)
def test_python_blocks_run(
    page: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    exec(compile(text, str(page), "exec"), names)  # raises what the block raises
    assert len(names) > 2, "the block defines nothing"  # beside its name and the builtins


@pytest.mark.parametrize(
    ("page", "words"), named([(page, words) for page, words, mark in SHELL if mark == "run"])
)
def test_short_commands_run(page: Path, words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *words[1:]], text=True, capture_output=True, cwd=tmp_path, env=ENVIRONMENT
    )
    assert not done.returncode, done.stderr


@pytest.mark.parametrize(("page", "words"), named(COMMANDS))
def test_every_option_of_a_command_exists(
    page: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, options = words[2].removeprefix("metavpt."), words[3:]
    options = [
        option for option in options if "=" in option and not option.startswith("problem=...")
    ]
    if "--config-dir" in words:
        options.append(f"hydra.searchpath=[file://{ROOT / 'examples' / 'conf'}]")
    for launcher in (
        option.removeprefix("hydra/launcher=")
        for option in options
        if option.startswith("hydra/launcher=")
    ):
        pytest.importorskip(LAUNCHERS[launcher], reason="its extra is not installed")
    if "-m" in words[3:]:  # a sweep: one value of each, and of a range any
        options = [re.sub(r"=(tag|interval|range)\(.*\)$", "=1", option) for option in options]
        options = [re.sub(r"=([^\[{,]+),.*", r"=\1", option) for option in options]
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        if name != "compare":
            config = compose(
                name if name in ("bench", "evaluate", "export", "debug") else "run", options
            )
            assert OmegaConf.to_container(config, resolve=True)
            return
        # options of `strategy` hold for the rows that have them: the command takes them out before
        # hydra sees them
        monkeypatch.setattr(
            command, "shared", [option for option in options if option.startswith("strategy.")]
        )
        own = [option for option in options if not option.startswith("strategy.")]
        config = compose("compare", own, return_hydra_config=True)
        HydraConfig.instance().set_config(config)
        rows = command.compositions(config)
    assert {"fixed", "one_step"} & set(rows) or "mask" in rows or "one_step_linear" in rows


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {(page.name, words[1]) for page, words, _ in SHELL if words[0] == "make"}
    asked |= {
        (page.name, span.split()[1]) for page, span in INLINE if re.fullmatch(r"make [\w-]+", span)
    }
    assert asked
    assert not [one for one in asked if one[1] not in targets]


def test_choices_named_in_the_text_exist() -> None:
    groups = {
        str(folder.relative_to(ROOT / "configs"))
        for folder in (ROOT / "configs").rglob("*")
        if folder.is_dir()
    }
    found = 0
    for page, span in INLINE:
        for group, names in re.findall(r"(?:^|\s)([\w/]+)=\[?([\w,]+)\]?(?=\s|$)", span):
            if group in groups and group not in ("budget", "hydra"):
                found += 1
                missing = [
                    name
                    for name in names.split(",")
                    if name != "null" and not (ROOT / "configs" / group / f"{name}.yaml").is_file()
                ]
                assert not missing, f"{page.name}: {span}"
    assert found


def test_files_named_in_the_text_exist() -> None:
    names = {
        span
        for _, span in INLINE
        if re.fullmatch(r"(metavpt|tests|examples|configs|docs|problems|benchmarks)/[\w./-]+", span)
    }
    assert names
    assert not [name for name in names if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert not [
        link
        for link in links
        if link and "://" not in link and not (page.parent / link).resolve().exists()
    ]


def test_every_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named_here = {
        name
        for page in PAGES
        for names in re.findall(r"install '\.\[([\w,]+)\]'", page.read_text())
        for name in names.split(",")
    }
    assert named_here
    assert named_here <= set(extras)


def test_every_dependency_stands_among_the_licences() -> None:
    rows = (DOCS / "licences.md").read_text()
    assert not [
        name
        for name in runpy.run_path(str(DOCS / "licences.py"))["declared"]()
        if f"| {name} |" not in rows
    ]


def test_the_picture_of_results_shows_what_was_measured() -> None:
    picture = (DOCS / "results.svg").read_text()
    panels = [("toy_sources", "error", 2), ("gsm8k_retention", "gsm8k/nll", 2)]
    vision = ("rooms_functional", "nyuv2_gpu_policies")
    panels += [(folder, "ridge/depth_rmse", 3) for folder in vision]
    for folder, metric, digits in panels:
        values: dict[str, list[float]] = {}
        for result in results.read(DOCS / "results" / folder):
            values.setdefault(result.row, []).append(result.metrics[metric])
        for row, found in values.items():
            assert f">{sum(found) / len(found):.{digits}f}<" in picture, (
                f"{folder}: {row}; run python docs/pictures.py"
            )


def test_the_site_builds_strictly_and_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="make docs installs mkdocs")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**ENVIRONMENT, "NO_MKDOCS_2_WARNING": "1"},
        text=True,
        capture_output=True,
    )
    assert not done.returncode, done.stdout + done.stderr
    elsewhere = re.compile(
        r"<(?:script|img|iframe)[^>]*\bsrc=.(?:https?:)?//|<link[^>]*\bhref=.(?:https?:)?//"
    )
    pages = list((tmp_path / "site").rglob("*.html"))
    assert pages
    assert not [page for page in pages if elsewhere.search(page.read_text())]
