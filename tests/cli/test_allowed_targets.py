"""What a configuration may call."""

import pytest
from helpers import command_process
from omegaconf import OmegaConf

from metavpt.cli.allowed_targets import check_targets
from metavpt.errors import MetaVPTError

REFUSED = [
    "os.system", "builtins.eval", "subprocess.run", "torch.hub.load", "torch.load", "numpy.load", "hydra.utils.call", "pickle.loads",
    "metavpt.run.command.shutil.rmtree", "metavpt.compare.runner.os.system", "channels.torch.hub.load", "channels.nn", "metavpt", "no.such.package",
    "transformers.AutoModel.from_pretrained", "torch.nn.modules.module.torch.load",
]  # fmt: skip
ALLOWED = [
    "metavpt.training.trainer.Trainer",
    "metavpt.OneStep",
    "torch.optim.AdamW",
    "torch.nn.GELU",
    "kornia.augmentation.RandomHorizontalFlip",
]


@pytest.mark.parametrize("target", REFUSED)
def test_what_is_not_ours_nor_the_users_is_refused_wherever_it_stands(target):
    for config in (
        {"_target_": target},
        {"a": [{"b": {"_target_": target, "_partial_": True}}]},
        {"x": target, "_target_": "${x}"},
    ):
        with pytest.raises(MetaVPTError, match=r"allow_targets="):
            check_targets(OmegaConf.create(config))


@pytest.mark.parametrize("target", ALLOWED)
def test_what_configurations_are_made_of_is_allowed(target):
    check_targets(OmegaConf.create({"a": [{"_target_": target}]}))


def test_the_users_own_code_is_allowed_without_asking():
    check_targets(OmegaConf.create({"_target_": "channels.Channels"}))


def test_own_code_beside_installed_code_stays_apart(tmp_path, monkeypatch):
    """The same file is the user's in a folder of their own, and somebody else's where pip puts it."""
    for place in (tmp_path / "mine", tmp_path / "lib" / "site-packages"):
        place.mkdir(parents=True)
        name = f"problem_in_{place.name.replace('-', '_')}"
        (place / f"{name}.py").write_text("import os\n\ndef make():\n    return 1\n")
        monkeypatch.syspath_prepend(place)
    check_targets(OmegaConf.create({"_target_": "problem_in_mine.make"}))
    for target in ("problem_in_site_packages.make", "problem_in_mine.os.system"):
        with pytest.raises(MetaVPTError, match="allow_targets"):
            check_targets(OmegaConf.create({"_target_": target}))


def test_what_is_asked_for_is_allowed_and_nothing_else():
    config = OmegaConf.create({"a": {"_target_": "collections.OrderedDict"}})
    check_targets(config, ["collections"])
    with pytest.raises(MetaVPTError, match=r"collections\.OrderedDict"):
        check_targets(config, ["coll"])


HOSTILE = {
    "a file": "_target_: os.system\ncommand: touch harm\n",
    "a file that allows itself": "# @package _global_\nallow_targets: [os]\nproblem: {_target_: os.system, command: touch harm}\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_configuration_from_others_runs_nothing(tmp_path, text):
    (tmp_path / "theirs" / "problem").mkdir(parents=True)
    (tmp_path / "theirs" / "problem" / "nice.yaml").write_text(text)
    status, output = command_process.finish(
        tmp_path, "problem=nice", f"hydra.searchpath=[file://{tmp_path / 'theirs'}]", "device=cpu"
    )
    assert status == 2
    assert "_target_: os.system is neither part of metavpt nor code of your own" in output
    assert not list(tmp_path.rglob("harm"))
