"""Other packages stay optional: nothing imports them early, and a missing one is a clear error."""

import subprocess
import sys

import hydra
import pytest
import torch
from helpers.ridge import Ridge

from metavpt.errors import MetaVPTError
from metavpt.hypergradients.optimizer_updates import SGD
from metavpt.interop import betty, learn2learn, torchopt
from metavpt.strategies.learned import Learned

ESTIMATORS = [
    betty.Darts(),
    betty.ConjugateGradient(),
    torchopt.TorchOptUnroll(1, SGD(0.1)),
    learn2learn.MAMLUnroll(1),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
def test_a_missing_package_is_an_error_that_says_how_to_get_it(estimator, monkeypatch):
    for module in ("betty", "betty.hypergradient", "betty.configs", "torchopt", "learn2learn"):
        monkeypatch.setitem(sys.modules, module, None)
    ridge = Ridge.random()
    theta = {"theta": torch.zeros(6, dtype=torch.float64)}
    with pytest.raises(
        MetaVPTError, match=r"(betty|torchopt|learn2learn): cannot be imported .* `make peers`"
    ):
        estimator([ridge.inner], ridge.outer, theta, ridge.phi)


def test_nothing_imports_the_packages_before_they_are_used():
    code = """
import sys, metavpt.training.trainer
import metavpt.interop.betty, metavpt.interop.torchopt, metavpt.interop.learn2learn
print({"betty", "torchopt", "learn2learn"} & set(sys.modules))
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )


@pytest.mark.parametrize("name", ["betty", "torchopt", "learn2learn"])
def test_configurations_build_without_the_packages(name):
    with hydra.initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = hydra.compose("run", ["problem=toy_sources", f"strategy={name}"])
    strategy = hydra.utils.instantiate(cfg.strategy)
    assert isinstance(strategy, Learned)
    assert name in type(strategy.estimator).__module__
