"""The classes and functions that a configuration may construct.

`_target_` can name anything that Python can import, and a configuration may come from others. Names
are therefore looked up in a registry before anything is imported. Allowed are:

- targets of the package's own configurations, and the classes of its public API;
- the optimizers of torch.optim;
- public classes and functions of the user's own modules, see `is_own`;
- targets that the command line allows: `allow_targets=[package.module.Name]`, or a package or
  module.
"""

import ast
import inspect
import re
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object

from metavpt.errors import MetaVPTError

TARGET = re.compile(r"_target_:\s*(metavpt\.[\w.]+)")
INSTALLED = {"site-packages", "dist-packages"}


def check_targets(content: Any, also: Sequence[str] = ()) -> None:
    """Check that every `_target_` in `content` may be constructed.

    Args:
        content: A configuration as plain dicts and lists, without interpolations.
        also: Names, modules and packages that the command line allows.

    Raises:
        MetaVPTError: A target is not allowed.
    """
    targets = list(_targets(content))
    for target in targets:
        if not (target in registry() or is_own(target) or _is_below(target, also)):
            raise _refusal(target)
    for target in targets:  # nothing is imported until every name has passed
        if not (target in registry() or target in also or is_own(target)):
            _check_found(target, also)


@cache
def registry() -> frozenset[str]:
    """Return the full names of the package's own targets and of torch's optimizers."""
    named = {
        name
        for path in Path(str(files("metavpt.configs"))).rglob("*.yaml")
        for name in TARGET.findall(path.read_text(encoding="utf-8"))
    }
    api = import_module("metavpt")  # not above: it imports what stands above this module
    public = [getattr(api, name) for name in api.__all__]
    classes = [item for item in public if inspect.isclass(item) and not issubclass(item, Exception)]
    optimizers = [
        name
        for name, item in vars(torch.optim).items()
        if inspect.isclass(item) and issubclass(item, torch.optim.Optimizer)
    ]
    return frozenset(
        named
        | {f"metavpt.{item.__name__}" for item in classes}
        | {f"{item.__module__}.{item.__name__}" for item in classes}
        | {f"torch.optim.{name}" for name in optimizers}
    )


def is_own(target: str) -> bool:
    """Return whether `target` is a public class or function defined in a module of the user.

    Own modules lie outside of Python's library and of installed packages: in the working directory,
    on PYTHONPATH or in an editable install. The source is read, not imported. A name that the
    module imports from elsewhere, a method, or a name with a leading underscore in any part does
    not count.
    """
    *module, name = target.split(".")
    if not module or any(not part.isidentifier() or part[0] == "_" for part in (*module, name)):
        return False
    source = _source(module)
    if source is None or module[0] == "metavpt" or _is_installed(source):
        return False
    try:
        statements = ast.parse(source.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError):
        return False
    return any(
        isinstance(item, (ast.ClassDef, ast.FunctionDef)) and item.name == name
        for item in statements
    )


def _source(module: Sequence[str]) -> Path | None:
    """Find the file of a module without importing it or its packages."""
    try:
        spec = find_spec(module[0])
        for k in range(1, len(module)):
            if spec is None:
                return None
            places = list(spec.submodule_search_locations or [])
            spec = PathFinder.find_spec(".".join(module[: k + 1]), places)
    except (ImportError, ValueError):
        return None
    origin = (spec.origin if spec else None) or ""
    return Path(origin) if origin.endswith(".py") else None


def _is_installed(file: Path) -> bool:
    library = Path(sysconfig.get_path("stdlib")).resolve()
    file = file.resolve()
    return bool(INSTALLED & set(file.parts)) or library in file.parents


def _is_below(target: str, also: Sequence[str]) -> bool:
    """Return whether the command line allows `target`, by its name or by a module or package of it.

    Private names and methods are allowed by their full name only.
    """
    if target in also:
        return True
    is_public = not any(part.startswith("_") for part in target.split("."))
    return is_public and any(target.startswith(f"{package}.") for package in also)


def _check_found(target: str, also: Sequence[str]) -> None:
    """Check the object that a name leads to, since `package.os.system` belongs to os."""
    try:
        found = get_object(target)
    except Exception:
        return  # Hydra's own message names the error
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", "")
    is_plain = (inspect.isclass(found) or inspect.isroutine(found)) and "." not in name
    is_below = any(f"{module}.".startswith(f"{package}.") for package in also)
    if not (is_plain and is_below and target.endswith(f".{name}")):
        raise _refusal(target)


def _refusal(target: str) -> MetaVPTError:
    return MetaVPTError(
        f"_target_: {target} is not a target of metavpt and not a public class or function of "
        "your own code; it could run anything. "
        f"If you trust it, set allow_targets=[{target}] on the command line"
    )


def _targets(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "_target_":
                yield str(value)
            yield from _targets(value)
    elif isinstance(content, list):
        for item in content:
            yield from _targets(item)
