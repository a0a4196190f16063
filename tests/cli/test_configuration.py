"""Configurations from others: a file below --config-dir, and the folder of a run."""

import inspect
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import command_process
from helpers.damaged import MIB, growth
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from metavpt.cli.configuration import check, check_targets, is_own, read_config, registry
from metavpt.cli.one_line_errors import USER_ERRORS, reason
from metavpt.cli.yaml_size import check_yaml
from metavpt.errors import MetaVPTError
from metavpt.report.page import configuration
from metavpt.training import health

HARM = "{_target_: os.mkdir, path: harm}"
# By names that were allowed: a call of what an import made by name returns.
CALLED_THROUGH_LIBRARIES = """
_target_: torchvision.transforms.Lambda.__call__
_args_:
  - _target_: torchvision.transforms.Lambda
    lambd: {_target_: timm.optim._optim_factory._import_class, class_string: sympy.sympify}
  - "__import__('os').mkdir('harm')"
"""
PLAIN = ["problem=toy_sources", "budget.steps=2", "trainer.probe_every=2", "threads=1"]


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())


def refused(folder: Path, *options: str, **how: Any) -> str:
    """The line that the command ends with; it has run nothing and left no run behind."""
    status, output = command_process.finish(folder, *options, **how)
    assert status == 2, output
    assert len(output.splitlines()) == 1, output
    assert not list(folder.rglob("harm"))
    assert not list(folder.rglob("config.yaml"))
    return output


HOSTILE = {
    "called through libraries": CALLED_THROUGH_LIBRARIES,
    "a file": "_target_: os.mkdir\npath: harm\n",
    "an argument": "_target_: metavpt.problems.sources.Sources\nsizes: [[" + HARM + "]]\n",
    "a file that allows itself": (
        "# @package _global_\nallow_targets: [os]\nproblem: " + HARM + "\n"
    ),
    "a name that is put together": "x: os\n_target_: ${.x}.mkdir\npath: harm\n",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_file_of_others_runs_nothing(tmp_path, text):
    put(tmp_path / "theirs" / "problem" / "nice.yaml", text)
    assert "_target_" in refused(tmp_path, "--config-dir", "theirs", "problem=nice")


@pytest.mark.parametrize("module", ["run", "check", "bench", "compare"])
def test_every_command_checks_before_it_constructs(tmp_path, module):
    put(tmp_path / "theirs" / "problem" / "nice.yaml", "_target_: os.mkdir\npath: harm\n")
    options = ["--config-dir", "theirs", "problem=nice"]
    options += ["budget.steps=1"] if module == "compare" else []
    assert "_target_: os.mkdir" in refused(tmp_path, *options, module=module)


@pytest.mark.parametrize("module", ["debug", "export"])
@pytest.mark.parametrize("problem", [HARM, f"\n{indented(CALLED_THROUGH_LIBRARIES)}"])
def test_the_folder_of_a_run_runs_nothing(tmp_path, module, problem):
    run = put(tmp_path / "run" / "config.yaml", f"learner: {{}}\nproblem: {problem}\n").parent
    put(run / health.FAILURE_FILE, "")
    with pytest.raises(MetaVPTError, match="_target_: "):
        read_config(run)
    options = [f"run={run}"] + ([f"to={tmp_path / 'to'}"] if module == "export" else [])
    status, output = command_process.finish(tmp_path, *options, module=module)
    assert status == 2, output
    assert "_target_: " in output
    assert not list(tmp_path.rglob("harm"))


def test_a_row_of_a_comparison_is_checked_as_well(tmp_path):
    put(tmp_path / "theirs" / "strategy" / "nice.yaml", "_target_: os.mkdir\npath: harm\n")
    own = "# @package _global_\nstrategies: [%s]\ncontrols: []\n"
    put(tmp_path / "theirs" / "experiment" / "one.yaml", own % "nice")
    put(
        tmp_path / "theirs" / "experiment" / "two.yaml",
        own % "'fixed allow_targets=[os] problem=nice'",
    )
    put(
        tmp_path / "theirs" / "experiment" / "three.yaml",
        own % "'fixed +hydra.searchpath=[pkg://this]'",
    )
    shutil.copytree(tmp_path / "theirs" / "strategy", tmp_path / "theirs" / "problem")
    for name, fault in (("one", "os.mkdir"), ("two", "os.mkdir"), ("three", "hydra.searchpath")):
        options = ["--config-dir", "theirs", f"experiment={name}", "problem=toy_sources"]
        assert fault in refused(tmp_path, *options, "budget.steps=1", module="compare")


# Hydra acts on its own section before a command begins.

CONFIGURES_HYDRA = {
    "callbacks": ("# @package _global_\nhydra: {callbacks: {a: " + HARM + "}}\n", "problem=nice"),
    "a package": (f"# @package hydra.callbacks.nice\n{HARM}\n", "+problem@hydra.callbacks.b=nice"),
    "logging": (
        "# @package _global_\n"
        "hydra: {job_logging: {version: 1, handlers: {a: {(): os.mkdir, path: harm}}}}\n",
        "problem=nice",
    ),
    "options of the command line": (
        "# @package _global_\nhydra: {overrides: {task: ['allow_targets=[os]']}}\n"
        "problem: " + HARM + "\n",
        "problem=nice",
    ),
    "a sweep that allows": (
        "# @package _global_\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {allow_targets: '[os]'}}}\nproblem: "
        + HARM + "\n",
        "problem=nice",
    ),
    "the environment": (
        "# @package _global_\nhydra: {job: {env_set: {LD_PRELOAD: x}}}\n",
        "problem=nice",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "option"), CONFIGURES_HYDRA.values(), ids=CONFIGURES_HYDRA)
def test_a_file_does_not_configure_hydra(tmp_path, text, option):
    put(tmp_path / "theirs" / "problem" / "nice.yaml", text)
    assert "configures Hydra itself" in refused(tmp_path, "--config-dir", "theirs", option)


def test_the_command_line_lets_a_file_configure_hydra(tmp_path):
    text = "# @package _global_\nhydra: {job: {env_set: {NOTHING: '1'}}}\n"
    put(tmp_path / "mine" / "experiment" / "x.yaml", text)
    options = ["--config-dir", "mine", "experiment=x", "allow_targets=[hydra]", *PLAIN]
    status, output = command_process.finish(tmp_path, *options)
    assert status == 0, output


def test_a_file_leads_nowhere_else(tmp_path):
    put(tmp_path / "private.yaml", "password: swordfish\n")
    put(tmp_path / "theirs" / "experiment" / "up.yaml", "defaults: ['../../private']\n")
    (tmp_path / "theirs" / "experiment" / "link.yaml").symlink_to(tmp_path / "private.yaml")
    for name in ("up", "link"):
        assert "leads out of the folder" in refused(
            tmp_path, "--config-dir", "theirs", f"experiment={name}"
        )


# The environment.


@pytest.mark.parametrize(
    "value",
    ["${oc.env:SECRET}", "${oc.env:SECRET,default}", "${oc.${x}:SECRET}",
        "${oc.decode:\"'${oc.env:SECRET}'\"}"]
)  # fmt: skip
def test_the_environment_is_not_read(tmp_path, monkeypatch, value):
    monkeypatch.setenv("SECRET", "swordfish")
    config = {"x": "env", "y": "SECRET", "name": value}
    with pytest.raises(USER_ERRORS) as caught:
        check(OmegaConf.create(config))
    assert "allow_env=[SECRET]" in reason(caught.value)
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(MetaVPTError, match=r"allow_env=\[SECRET\]"):
        read_config(tmp_path)


def test_an_escaped_interpolation_would_be_resolved_later():
    with pytest.raises(MetaVPTError, match=r"^a\.0"):
        check(OmegaConf.create({"a": [r"\${oc.env:SECRET}"]}))


SECRET = {"SECRET": "swordfish"}
FROM_THE_ENVIRONMENT = "# @package _global_\nrun_name: ${oc.env:SECRET}\n"


def test_a_secret_reaches_no_file_unless_the_command_line_allows_it(tmp_path):
    put(tmp_path / "theirs" / "experiment" / "x.yaml", FROM_THE_ENVIRONMENT)
    put(
        tmp_path / "theirs" / "experiment" / "y.yaml",
        FROM_THE_ENVIRONMENT + "allow_env: [SECRET]\n",
    )
    for options in (
        ["experiment=x"],
        ["experiment=x", "+other=${oc.env:SECRETS,x}"],
        ["experiment=y"],
    ):
        line = refused(tmp_path, "--config-dir", "theirs", *PLAIN, *options, environment=SECRET)
        assert "allow_env=[SECRET]" in line
        assert "swordfish" not in line
    for folder, allows in (("a", "allow_env=[SECRET]"), ("b", "+other=${oc.env:SECRET}")):
        options = ["--config-dir", "theirs", "experiment=x", *PLAIN, allows, f"output={folder}"]
        status, output = command_process.finish(tmp_path, *options, environment=SECRET)
        assert status == 0, output
        assert "run_name: swordfish" in (tmp_path / folder / "config.yaml").read_text()


# Configurations that grow.


def aliases(depth: int, merge: bool = False) -> str:
    """Each line stands for twice the one before it."""
    twice = "{{<<: [*a{0}, *a{0}]}}" if merge else "[*a{0}, *a{0}]"
    return "a0: &a0 {x: 1}\n" + "".join(
        f"a{k + 1}: &a{k + 1} {twice.format(k)}\n" for k in range(depth)
    )


def interpolations(depth: int, inside: str = '"${{a{0}}}${{a{0}}}"') -> str:
    return "a0: xxxxxxxxxx\n" + "".join(f"a{k + 1}: {inside.format(k)}\n" for k in range(depth))


BOMBS = {
    "aliases": aliases(27),
    "merged aliases": aliases(27, merge=True),
    "an alias of itself": "a: &a [*a]\n",
    "text": interpolations(30),
    "mappings": interpolations(30, "{{x: '${{a{0}}}', y: '${{a{0}}}'}}"),
    "a long text many times": f"a: {'x' * 100_000}\nb: {'${a}' * 2_400}\n",
    "a long text of interpolations": f"a: x\nb: {'${a}' * 100_000}\n",
    "a large list many times": f"a: [{'1,' * 3000}]\n"
    + "".join(f"b{k}: ${{a}}\n" for k in range(3000)),
    "made by a resolver": interpolations(30,
        "\"${{oc.decode:'[${{a{0}}},${{a{0}}}]'}}\"").replace("xx", "'x"),
    "an interpolation of itself": "a: ${b}\nb: ${a}\n",
    "a deep one": "a: " + "[" * 3000 + "]" * 3000 + "\n",
}  # fmt: skip


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_configuration_that_grows_is_one_line_in_little_time_and_memory(tmp_path, text):
    put(tmp_path / "config.yaml", text)
    put(tmp_path / "problem" / "nice.yaml", text)
    lines: list[str] = []

    def both() -> None:
        for read in (lambda: read_config(tmp_path), compose_and_check):
            with pytest.raises(USER_ERRORS) as caught:
                read()
            lines.append(reason(caught.value))

    def compose_and_check() -> None:
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            check(compose("config" if "b0" in text else "problem/nice"))

    began = time.process_time()
    grown = growth(both)
    assert time.process_time() - began < 30
    assert grown < 64 * MIB
    assert not any("Error" in line.partition(":")[0] for line in lines), lines
    assert len(lines) == 2
    if "&a" in text:
        assert all(".yaml: not a readable configuration" in line for line in lines)


def test_a_report_leaves_out_a_configuration_that_grows(tmp_path):
    put(tmp_path / "config.yaml", aliases(27, merge=True))
    began = time.process_time()
    assert configuration(tmp_path) == {}
    assert time.process_time() - began < 10


def test_aliases_that_add_little_are_fine():
    check_yaml("a: &a [1, 2, 3]\nb: *a\nc: {<<: &d {x: 1}}\n")
    check_yaml(aliases(5))
    check_yaml("a: [")  # the reader says what is wrong with it


CONFIGS = Path(__file__).parents[2] / "configs"
REFUSED = [
    # the system, and what loads or evaluates
    "os.system", "builtins.eval", "subprocess.run", "torch.load", "torch.hub.load", "pickle.loads",
    "numpy.load", "hydra.utils.call", "functools.partial", "transformers.AutoModel.from_pretrained",
    # libraries that are full of functions which call what they are given
    "torchvision.transforms.Lambda", "torchvision.transforms.Lambda.__call__", "torch.nn.GELU",
    "timm.optim._optim_factory._import_class", "kornia.augmentation.AugmentationSequential",
    # through the package's own modules: what they import, what they keep to themselves, methods
    "metavpt.run.command.shutil.rmtree", "metavpt.compare.runner.os.system", "metavpt",
    "metavpt.training.checkpoint._remove", "metavpt.training.checkpoint.Checkpoints.save",
    "metavpt.training.checkpoint.write", "metavpt.hypergradients.trees.map_tensors",
    "torch.optim.Adam.step", "torch.optim.lr_scheduler.LambdaLR",
    "torch.optim.swa_utils.AveragedModel",
    # names of nothing
    "no.such.package", "", ".", "..", "channels", "channels.", "3",
]  # fmt: skip
OWN = """
import os
from os import mkdir as make_folder
from subprocess import Popen

class Problem:
    def method(self): ...
    class Inner: ...

def make(): ...
def _hidden(): ...

alias = os.system
open("imported", "w").close()
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A folder of one's own, that Python imports from, and one where packages are installed."""
    for place in (tmp_path / "mine", tmp_path / "lib" / "site-packages"):
        name = f"code_in_{place.name.replace('-', '_')}"
        (place / f"package_{name}" / "_private").mkdir(parents=True)
        for file in (
            f"{name}.py",
            f"package_{name}/module.py",
            f"package_{name}/_private/module.py",
        ):
            (place / file).write_text(OWN)
        monkeypatch.syspath_prepend(place)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("target", REFUSED)
def test_a_name_that_is_not_allowed_is_refused_wherever_it_stands(target):
    for content in (
        {"_target_": target},
        {"a": [{"b": {"_target_": target, "_partial_": True}}]},
        {"_target_": "metavpt.Budget", "_args_": [[{"_target_": target}]]},
    ):
        with pytest.raises(MetaVPTError, match=r"allow_targets="):
            check_targets(content)


@pytest.mark.parametrize("target", [["os.system"], {"_target_": "os.system"}, None, 3])
def test_a_target_that_is_no_name_is_refused(target):
    with pytest.raises(MetaVPTError, match=r"allow_targets="):
        check_targets({"_target_": target})


def test_every_target_of_the_own_configurations_is_in_the_registry():
    def targets(node):
        if isinstance(node, dict):
            yield from [node["_target_"]] if "_target_" in node else []
        if isinstance(node, (dict, list)):
            for value in node.values() if isinstance(node, dict) else node:
                yield from targets(value)

    found = {
        target
        for path in CONFIGS.rglob("*.yaml")
        if path.parent.parent.name != "hydra"  # Hydra's plugins, which it loads by itself
        for target in targets(yaml.safe_load(path.read_text()))
    }
    assert len(found) > 50
    assert found <= registry()


def test_the_registry_holds_public_classes_and_functions_and_no_methods():
    for name in registry():
        found = get_object(name)
        assert inspect.isclass(found) or inspect.isfunction(found), name
        assert "." not in found.__qualname__, name
        assert not any(part.startswith("_") for part in name.split(".")), name
        assert found.__module__.split(".")[0] in ("metavpt", "torch"), name


@pytest.mark.parametrize(
    "target",
    [
        "metavpt.training.trainer.Trainer",
        "metavpt.OneStep",
        "torch.optim.AdamW",
        "channels.Channels",
    ],
)
def test_what_configurations_are_made_of_is_allowed(target):
    check_targets({"a": [{"_target_": target}]})


def test_own_code_means_what_a_module_defines_under_a_public_name(own_code):
    module, package = "code_in_mine", "package_code_in_mine"
    allowed = ["Problem", "make"]
    refused = [
        "make_folder", "Popen", "os", "os.system", "alias", "_hidden", "Problem.method",
        "Problem.Inner",
        "__builtins__", "no_such_name",
    ]  # fmt: skip
    for name in allowed:
        assert is_own(f"{module}.{name}")
        assert is_own(f"{package}.module.{name}")
    for name in refused:
        assert not is_own(f"{module}.{name}")
        assert not is_own(f"{package}.module.{name}")
    assert not is_own(f"{package}._private.module.make")
    assert not is_own("code_in_site_packages.make")
    assert not is_own("package_code_in_site_packages.module.make")


def test_nothing_is_imported_by_the_check(own_code):
    check_targets({"_target_": "package_code_in_mine.module.make"})
    content = [{"_target_": "code_in_mine.make"}, {"_target_": "code_in_mine.alias"}]
    with pytest.raises(MetaVPTError, match=r"code_in_mine\.alias"):
        check_targets(content)
    with pytest.raises(MetaVPTError, match="antigravity"):
        check_targets([*content, {"_target_": "antigravity.geohash"}], ["code_in_mine"])
    assert not {"code_in_mine", "package_code_in_mine", "antigravity"} & sys.modules.keys()
    assert not Path("imported").exists()


def test_the_command_line_allows_a_name_or_a_package_and_nothing_else():
    check_targets({"_target_": "collections.OrderedDict"}, ["collections"])
    check_targets({"_target_": "collections.OrderedDict"}, ["collections.OrderedDict"])
    check_targets({"_target_": "timm.optim.create_optimizer_v2"}, ["timm.optim"])
    for target, also in (
        ("collections.OrderedDict", ["coll"]),
        ("collections.OrderedDict", ["collections.OrderedDict.fromkeys"]),
        ("collections.OrderedDict.fromkeys", ["collections"]),  # a method
        ("collections.OrderedDict.fromkeys", ["collections.OrderedDict"]),
        ("collections._sys.exit", ["collections"]),  # another package's
        ("logging.os.system", ["logging"]),
        ("timm.optim._optim_factory._import_class", ["timm.optim"]),  # private
    ):
        with pytest.raises(MetaVPTError, match="allow_targets"):
            check_targets({"_target_": target}, also)
    check_targets({"_target_": "timm.optim._optim_factory._import_class"},
                  ["timm.optim._optim_factory._import_class"])  # fmt: skip
