"""Options against the annotations of what takes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import get_object
from omegaconf import OmegaConf
from torch import Tensor

from metavpt import Budget, WarmupCosine
from metavpt.errors import MetaVPTError
from metavpt.training.build import check_option_types

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


class Inner:
    """A class of no package that says what its parts are."""

    def __init__(
        self,
        size: int,
        rate: float = 0.1,
        names: list[str] | None = None,
        pair: tuple[int, int] = (1, 2),
        make: Callable[[], Any] | None = None,
        weights: Tensor | None = None,
        by_name: dict[str, float] | None = None,
        anything: Any = None,
    ) -> None: ...


class Outer(Inner):
    """Passes on what it does not name."""

    def __init__(self, width: float, **options: Any) -> None: ...


def check(**options: Any) -> None:
    node = {"_target_": f"{__name__}.Inner", "size": 1, **options}
    check_option_types(OmegaConf.create({"part": node}))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metavpt.training.build._find", lambda target: Inner)


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 1},
        {"rate": 1e-3},
        {"names": ["a", "b"]},
        {"names": None},
        {"pair": [3, 4]},
        {"make": {"_target_": "torch.optim.SGD", "_partial_": True}},
        {"weights": None},
        {"by_name": {"a": 1.0}},
        {"anything": {"a": [1, "b"]}},
        {"unknown": 3},
        {"size": "???"},
    ],
    ids=str,
)
def test_what_fits_passes(options: dict[str, Any]) -> None:
    assert check(**options) is None
    with pytest.raises(MetaVPTError, match=r"^part\.rate=fast: "):  # of both the one that is wrong
        check(**{**options, "rate": "fast"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 2.5}, r"part\.size=2\.5: must be a whole number"),
        ({"size": True}, r"part\.size=True: must be a whole number"),
        ({"size": "four"}, r"part\.size=four: must be a whole number"),
        ({"size": None}, r"part\.size=None: must be a whole number"),
        ({"rate": "fast"}, r"part\.rate=fast: must be a number"),
        ({"names": "a"}, r"part\.names=a: must be a list or null"),
        ({"names": [1]}, r"part\.names=\[1\]: must be a list or null"),
        ({"pair": [1, 2, 3]}, r"part\.pair=.*: must be a list"),
        ({"make": "sgd"}, r"part\.make=sgd: must be something to call"),
        ({"weights": 1.0}, r"part\.weights=1\.0: must be an object of Tensor or null"),
        ({"by_name": [1.0]}, r"part\.by_name=.*: must be a mapping or null"),
    ],
    ids=str,
)
def test_what_does_not_is_named_with_its_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MetaVPTError, match=message):
        check(**options)


def test_what_a_class_passes_on_to_its_base_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metavpt.training.build._find", lambda target: Outer)
    check(width=2, rate=0.5)
    with pytest.raises(MetaVPTError, match=r"part\.size=2\.5: must be a whole number"):
        check(width=2, size=2.5)


def test_objects_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sgd = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1}
    learned = {"_target_": "metavpt.strategies.learned.Learned", "optimizer": sgd}
    one_step = {"_target_": "metavpt.hypergradients.estimators.OneStep"}
    fixed = {"_target_": "metavpt.strategies.fixed.Fixed"}
    check_option_types(OmegaConf.create({"strategy": {**learned, "estimator": one_step}}))
    with pytest.raises(MetaVPTError, match=r"^strategy\.estimator=metavpt.strategies.fixed"):
        check_option_types(OmegaConf.create({"strategy": {**learned, "estimator": fixed}}))
    with pytest.raises(MetaVPTError, match=r"^strategy=one_step: must be an object of Strategy"):
        check_option_types(OmegaConf.create({"strategy": "one_step"}))


@pytest.mark.parametrize(
    ("target", "fits"),
    [
        ("metavpt.probes.heads.Ridge", False),
        ("metavpt.training.budget.Budget", True),
        ("collections.Counter", True),  # of a user, as far as is known
    ],
)
def test_a_factory_makes_what_is_asked_for(
    target: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "metavpt.training.build._find",
        lambda name: Inner if name.endswith("Inner") else get_object(name),
    )
    monkeypatch.setitem(
        Inner.__init__.__annotations__, "make", Callable[..., Budget | WarmupCosine] | None
    )
    with pytest.raises(MetaVPTError, match=rf"part\.make={target}"):  # an object, not a factory
        check(make={"_target_": target})
    node = {"_target_": target, "_partial_": True}
    with pytest.raises(MetaVPTError, match=rf"part\.by_name={target}"):
        check(by_name=node)
    if fits:
        check(make=node)
    else:
        with pytest.raises(MetaVPTError, match=rf"part\.make={target}: must be something to call"):
            check(make=node)


@pytest.mark.parametrize(
    "options",
    [
        *([f"experiment={name}"] for name in EXPERIMENTS),
        *([f"problem={path.stem}"] for path in sorted((CONFIGS / "problem").glob("*.yaml"))),
        *([f"strategy={path.stem}"] for path in sorted((CONFIGS / "strategy").glob("*.yaml"))),
    ],
    ids=str,
)
def test_every_shipped_configuration_passes(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        check_option_types(compose("run", [*options, "++data.path=/nowhere"]))
