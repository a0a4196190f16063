"""Which classes and functions a configuration may construct."""

import inspect
import sys
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object

from metavpt.cli.allowed_targets import check_targets, is_own, registry
from metavpt.errors import MetaVPTError

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
