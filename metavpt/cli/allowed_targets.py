"""What a configuration may call: `_target_` can name any function that Python can import, and a YAML file may come from others."""

import sysconfig
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from metavpt.errors import MetaVPTError

ALLOWED = (
    "metavpt",
    "torch.optim",
    "torch.nn",
    "torchvision.transforms",
    "kornia",
    "timm.optim",
    "timm.layers",
)
INSTALLED = {"site-packages", "dist-packages"}


def check_targets(config: DictConfig, also: Sequence[str] = ()) -> None:
    """Raises MetaVPTError for a `_target_` outside of `ALLOWED`, of `also` and of the user's own code. Nothing is called.

    Own code is what Python finds outside of its standard library and its installed packages: in the working directory, in PYTHONPATH, in
    an editable install. What a name leads to counts beside the name: metavpt.run.command.shutil.rmtree is shutil's. So a file from others cannot
    run code that it brings, nor the system's; it can still call what is allowed with arguments of its own, which may name files to write.

    Hydra's own section (callbacks, launcher, sweeper, searchpath) is acted on before any of our code runs: look for `hydra:` in a file from
    others before naming its folder with --config-dir.
    """
    for target in _targets(OmegaConf.to_container(config, resolve=True)):
        if not _is_allowed(target, also):
            package = target.partition(".")[0]
            raise MetaVPTError(
                f"_target_: {target} is neither part of metavpt nor code of your own, so this configuration could run anything; "
                f"if you trust it, say allow_targets=[{package}] on the command line"
            )


def asked_for() -> list[str]:
    """The packages in allow_targets=[...] of the command line: a file that asks for it itself is not heard."""
    found: list[str] = []
    for override in OverridesParser.create().parse_overrides(
        list(HydraConfig.get().overrides.task)
    ):
        if override.key_or_group == "allow_targets":
            value: Any = override.value()
            found = [str(name) for name in value] if isinstance(value, list) else [str(value)]
    return found


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield str(value)
            yield from _targets(value)
    elif isinstance(node, list):
        for item in node:
            yield from _targets(item)


def _is_allowed(target: str, also: Sequence[str]) -> bool:
    names = (*ALLOWED, *also)
    if not (_is_within(target, names) or _is_own(target)):
        return False
    try:
        found = get_object(target)
    except Exception:
        return True  # hydra says better than we what is wrong with the name
    home = getattr(found, "__module__", None)
    return isinstance(home, str) and callable(found) and (_is_within(home, names) or _is_own(home))


def _is_within(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _is_own(name: str) -> bool:
    """Whether the package that `name` begins with lies where neither Python nor pip put it."""
    try:
        spec = find_spec(name.partition(".")[0])
    except (ImportError, ValueError):
        return False
    places = [*(spec.submodule_search_locations or []), spec.origin] if spec else []
    files = [
        Path(place) for place in places if place not in (None, "built-in", "frozen", "namespace")
    ]
    library = Path(sysconfig.get_path("stdlib")).resolve()
    return bool(files) and not any(
        INSTALLED & set(file.parts) or library in file.resolve().parents for file in files
    )
