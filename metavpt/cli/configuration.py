"""Checks of configurations that may come from others, before anything in them takes effect.

A file below --config-dir, or config.yaml in the folder of a run, may come from someone else. Such a
file

- constructs only allowed targets;
- does not grow: YAML aliases and interpolations must not expand much beyond its size;
- does not read the environment, nor files outside of its folder;
- does not configure Hydra itself, which acts on its own section before a command begins.

`_target_` can name anything that Python can import. Names are therefore looked up in a registry
before anything is imported. Allowed are:

- targets of the package's own configurations, and the classes of its public API;
- the optimizers of torch.optim;
- public classes and functions of the user's own modules, see `is_own`;
- targets that the command line allows: `allow_targets=[package.module.Name]`, or a package or
  module.

The command line may allow more: `allow_targets=[name]`, `allow_env=[NAME]`,
`allow_targets=[hydra]`. Importing this module installs the checks in Hydra and OmegaConf, so no
command can skip them.
"""

import ast
import inspect
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import hydra
import hydra._internal.hydra
import torch
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_visitor import GrammarVisitor
from omegaconf.resolvers import oc

from metavpt.cli.one_line_errors import own_error, reporting
from metavpt.cli.yaml_size import check_yaml
from metavpt.errors import MetaVPTError, reading

MAX_GROWTH = 2**20  # limit on the characters that interpolations of a configuration expand to
INTERPOLATION = 100  # characters counted per interpolation, in addition to its value
TARGET = re.compile(r"_target_:\s*(metavpt\.[\w.]+)")
INSTALLED = {"site-packages", "dist-packages"}

Result = TypeVar("Result")

_overrides: ContextVar[Sequence[str]] = ContextVar("_overrides", default=())
_spent: ContextVar[list[int] | None] = ContextVar("_spent", default=None)


def command(
    config_name: str,
) -> Callable[[Callable[[DictConfig], Result]], Callable[[], Result | None]]:
    """Make a function of a configuration the entry point of a command.

    The function gets the checked configuration, composed from configs/<config_name>.yaml and the
    command line. Errors are reported as in `reporting`.
    """

    def decorate(function: Callable[[DictConfig], Result]) -> Callable[[], Result | None]:
        @hydra.main(
            version_base="1.3", config_path="pkg://metavpt.configs", config_name=config_name
        )
        @wraps(function)
        def main(config: DictConfig) -> Result:
            with reporting():
                check(config)
                return function(config)

        return main

    return decorate


def check(config: DictConfig, allow_targets: Sequence[str] | None = None) -> None:
    """Check a configuration before it is constructed. Nothing is imported.

    Args:
        config: May still hold interpolations. It is not changed.
        allow_targets: See `check_targets`. None: what the command line allows.

    Raises:
        MetaVPTError: The configuration must not be constructed.
    """
    try:
        with _one_allowance():
            content = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise own_error(error) or error from None
    for key, value in _strings(content):
        if "${" in value:  # reading the configuration would resolve it again
            raise MetaVPTError(f"{key}: remove the escaped interpolation, as in \\${{...}}")
    check_targets(content, allowed("allow_targets") if allow_targets is None else allow_targets)


def read_config(folder: Path, allow_targets: Sequence[str] | None = None) -> DictConfig:
    """Read, check and resolve config.yaml of a run.

    Raises:
        MetaVPTError: The file is missing, damaged or not allowed.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise MetaVPTError(f"run={folder}: not the folder of a run (config.yaml is missing)")
    with reading(f"{file}: not a readable configuration", "restore the file that the run wrote"):
        check_yaml(file.read_text(encoding="utf-8"))
        config = OmegaConf.load(file)
        if not isinstance(config, DictConfig):
            raise MetaVPTError(f"{file}: not a mapping, so not the configuration of a run")
        check(config, allow_targets)
        OmegaConf.resolve(config)
        return config


def allowed(option: str) -> list[str]:
    """Return the names in `option`=[...] of the command line. A file cannot set this option."""
    found: list[str] = []
    for text in _command_line():
        if text.partition("=")[0].lstrip("+") == option:
            value: Any = OverridesParser.create().parse_override(text).value()
            found = [str(name) for name in value] if isinstance(value, list) else [str(value)]
    return found


def _command_line() -> Sequence[str]:
    """Return the overrides that the user typed: those of the command, or those being composed."""
    if not HydraConfig.initialized():
        return _overrides.get()
    texts: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return texts


def _strings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, (dict, list)):
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _strings(value, f"{key}.{name}".lstrip("."))


# Targets: the classes and functions that a configuration may construct.


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


# Changes to OmegaConf: interpolations that grow, and those that read the environment.


@contextmanager
def _one_allowance() -> Iterator[None]:
    """Let all interpolations in the block share one limit. Otherwise every value has its own."""
    token = _spent.set([0])
    try:
        yield
    finally:
        _spent.reset(token)


def _visit_interpolation(self: GrammarVisitor, ctx: Any) -> Any:
    """Evaluate an interpolation within the limit of its value."""
    spent = _spent.get() or self.__dict__.setdefault("spent", [0])
    token = _spent.set(spent)
    try:
        value = _evaluate(self, ctx)
    finally:
        _spent.reset(token)
    spent[0] += INTERPOLATION + len(str(value))
    if spent[0] > MAX_GROWTH:
        raise MetaVPTError("the interpolations of the configuration expand too far; shorten them")
    return value


def _environment(key: str, *default: Any) -> str | None:
    """Evaluate `${oc.env:KEY}` if the command line uses it too, or allows it with `allow_env`."""
    typed = re.compile(rf"oc\.env:\s*{re.escape(key)}\b")
    if key in allowed("allow_env") or any(typed.search(text) for text in _command_line()):
        return oc.env(key, *default)
    raise MetaVPTError(
        f"the configuration reads the environment variable {key}, and its value would be written "
        f"into config.yaml and the report; to allow it, set allow_env=[{key}] on the command line"
    )


_evaluate = GrammarVisitor.visitInterpolation
GrammarVisitor.visitInterpolation = _visit_interpolation
OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


# Changes to Hydra: files that grow, that lead elsewhere, or that configure Hydra.


class FileConfigSource(file_config_source.FileConfigSource):  # Hydra finds it by this name
    """Configurations in a folder of the user or of others."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Load a configuration after its text has been checked."""
        folder = Path(self.path).resolve()
        file = (folder / self._normalize_file_name(config_path)).resolve()
        if file.is_file():
            if folder not in file.parents:
                raise MetaVPTError(f"{config_path}: leads out of the folder {folder}")
            with reading(f"{file}: not a readable configuration", "repair the file"):
                check_yaml(file.read_text(encoding="utf-8", errors="replace"))
        return super().load_config(config_path)


class ConfigLoader(ConfigLoaderImpl):
    """Hydra's loader. It knows what the command line allows, and keeps files out of `hydra`."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **options: Any
    ) -> DictConfig:
        """Load as Hydra does, and remember the overrides of the command line."""
        token = _overrides.set(overrides)
        try:
            return super().load_configuration(config_name, overrides, *args, **options)
        finally:
            _overrides.reset(token)

    def _load_single_config(self, default: Any, repo: Any) -> ConfigResult:
        result = super()._load_single_config(default, repo)
        is_file = str(result.path).startswith("file://")
        sets_hydra = isinstance(result.config, DictConfig) and "hydra" in result.config
        if is_file and sets_hydra and "hydra" not in allowed("allow_targets"):
            raise MetaVPTError(
                f"{default.config_path}: configures Hydra itself, which may run anything; set "
                "hydra options on the command line, or allow it with allow_targets=[hydra]"
            )
        return result


SourcesRegistry.instance().types["file"] = FileConfigSource
hydra._internal.hydra.ConfigLoaderImpl = ConfigLoader  # pyright: ignore[reportPrivateImportUsage]
