"""What runs without the extras: each extra's packages are blocked in a separate process."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from helpers.small_language import SMALL, TARGETS
from packaging.requirements import Requirement

from metavpt.cli.main import COMMANDS
from metavpt.errors import EXTRAS

ROOT = Path(__file__).parents[1]
README = (Path(__file__).parents[1] / "README.md").read_text()


COMMAND = """
import runpy
try:
    runpy.run_module("metavpt.run", run_name="__main__")
except SystemExit as stopped:
    print("status", stopped.code)
"""
ALL_COMMANDS = """
import sys
from metavpt.cli.main import COMMANDS, main
for name in COMMANDS:
    sys.argv[1:] = [name]
    try:
        main()
    except SystemExit as stopped:
        print(name, stopped.code)
"""


def test_hydra_is_of_a_version_whose_holes_are_closed() -> None:
    """1.3.8 is the first; the next minor version may undo what the checks change in Hydra."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (hydra,) = (
        requirement
        for text in stated["optional-dependencies"]["run"]
        if (requirement := Requirement(text)).name == "hydra-core"
    )
    assert hydra.specifier.contains(version("hydra-core"))
    for other in ("1.3.7", "1.3.2", "1.4.0", "2.0"):
        assert not hydra.specifier.contains(other)


def run(text: str, *extras: str, argv: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python without the packages of `extras`."""
    brought = {"huggingface_hub", "safetensors"} if "language" not in extras else set()
    blocked = sorted({package for extra in extras for package in EXTRAS[extra]} - brought)
    start = f"import sys; sys.modules.update(dict.fromkeys({blocked})); sys.argv[1:] = {argv}\n"
    return subprocess.run([sys.executable, "-c", start + text], text=True, capture_output=True)


def test_the_core_needs_no_extra() -> None:
    """The example of the README and the public names; a command is refused in one line."""
    example = next(
        block
        for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
        if "hypergradient(" in block
    )
    names = """
import metavpt
for name in metavpt.__all__:
    if name not in ("Trainer", "load", "write_report"):
        getattr(metavpt, name)
try:
    metavpt.Trainer
except ImportError as error:
    print(error)
"""
    done = run(example + names + COMMAND, "run", "vision", "language")
    assert not done.returncode, done.stderr
    assert "tensor([2.])" in done.stdout
    assert "pip install 'metavpt[run]'" in done.stdout
    assert "status 2" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "pip install 'metavpt[run]'" in line


def test_every_command_names_the_missing_extra() -> None:
    done = run(ALL_COMMANDS, "run", "vision", "language")
    assert not done.returncode, done.stderr
    assert done.stdout.split() == [word for name in COMMANDS for word in (name, "2")]
    lines = done.stderr.splitlines()
    assert len(lines) == len(COMMANDS)
    assert all("pip install 'metavpt[run]'" in line for line in lines)


def test_vision_needs_no_language() -> None:
    problems = "from metavpt.problems import data2vec_dense, dino_dense, ijepa_dense, mae_dense\n"
    problems += "import metavpt.compare.command, metavpt.check.command, metavpt.bench.command"
    done = run(problems, "language")
    assert not done.returncode, done.stderr


def test_language_needs_no_vision_and_a_problem_without_its_extra_is_one_line() -> None:
    problems = "from metavpt.problems import lm_gsm8k, sources\nimport metavpt.export.command\n"
    problems += "import metavpt.run.command"
    done = run(problems + COMMAND, "vision", argv=("problem=dino", "device=cpu"))
    assert not done.returncode, done.stderr
    assert "status 2" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "pip install 'metavpt[vision]'" in line


def test_a_language_model_is_evaluated_without_vision(tmp_path: Path) -> None:
    options = (*SMALL, *TARGETS, "device=cpu", "threads=1", f"output={tmp_path / 'scores'}")
    done = run(COMMAND.replace("metavpt.run", "metavpt.evaluate"), "vision", argv=options)
    assert not done.returncode, done.stderr
    assert "answers/nll" in (tmp_path / "scores" / "evaluation.json").read_text()


def test_optuna_is_named_where_it_is_missing(tmp_path: Path) -> None:
    argv = ("-m", "problem=toy_sources", "hydra/sweeper=metavpt_optuna", f"runs={tmp_path}")
    done = run(COMMAND, "optuna", argv=argv)
    assert "status 2" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "pip install 'metavpt[optuna]'" in line


def test_the_dockerfile_names_what_the_package_has() -> None:
    text = (ROOT / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (command,) = re.findall(r'^ENTRYPOINT \["(\S+)"\]$', text, re.MULTILINE)
    assert command in project["scripts"]
    version = re.findall(r"^FROM python:(\d+\.\d+)-slim$", text, re.MULTILINE)
    assert version == ["3.12"]
    assert not [
        name for name in re.findall(r"--constraint (\S+)", text) if not (ROOT / name).is_file()
    ]


def test_a_wheel_would_hold_every_package() -> None:
    """The list is by hand, since configs and problems lie outside of the package's folder."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {file.parent for file in (ROOT / "metavpt").rglob("*.py")}
    there |= {ROOT / "metavpt" / "problems", ROOT / "metavpt" / "configs"}
    there |= {file.parent for file in (ROOT / "hydra_plugins").rglob("*.py")}
    assert sorted(listed) == sorted(".".join(p.relative_to(ROOT).parts) for p in there)
