"""Configurations that may come from others: what they may hold, before anything in them is acted on.

A file below --config-dir, or config.yaml in the folder of a run, may be somebody else's. Such a
file

- constructs only what `metavpt.cli.allowed_targets` allows;
- does not grow: neither YAML aliases nor interpolations make much more of it than it holds;
- does not read the environment, nor files outside of its folder;
- does not configure Hydra itself, which acts on its own section before a command begins.

The command line may allow it: `allow_targets=[name]`, `allow_env=[NAME]`, `allow_targets=[hydra]`.
Importing this module puts the checks into Hydra and OmegaConf, so no command can leave them out.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import hydra
import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_visitor import GrammarVisitor
from omegaconf.resolvers import oc

from metavpt.cli.allowed_targets import check_targets
from metavpt.cli.one_line_errors import own_error, reporting
from metavpt.cli.yaml_size import check_yaml
from metavpt.errors import MetaVPTError, reading

MAX_GROWTH = 2**20  # characters that the interpolations of a configuration may come to
INTERPOLATION = 100  # characters that evaluating one counts for, beside those of its value

Result = TypeVar("Result")

_overrides: ContextVar[Sequence[str]] = ContextVar("_overrides", default=())
_spent: ContextVar[list[int] | None] = ContextVar("_spent", default=None)


def command(
    config_name: str,
) -> Callable[[Callable[[DictConfig], Result]], Callable[[], Result | None]]:
    """Make a function of a configuration the entry point of a command.

    The function gets the checked configuration that the command line makes of
    configs/<config_name>.yaml; its errors are reported as `reporting` does.
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
    """Raise MetaVPTError for a configuration that must not be constructed; nothing is imported.

    Args:
        config: May still hold interpolations; it is left as it is.
        allow_targets: See `check_targets`; None for what the command line allows.
    """
    try:
        with _one_allowance():
            content = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise own_error(error) or error from None
    for key, value in _strings(content):
        if "${" in value:  # it would be resolved once more when the configuration is read
            raise MetaVPTError(f"{key}: an escaped interpolation, as in \\${{...}}; leave it out")
    check_targets(content, allowed("allow_targets") if allow_targets is None else allow_targets)


def read_config(folder: Path, allow_targets: Sequence[str] | None = None) -> DictConfig:
    """The checked configuration in config.yaml of a run, resolved."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise MetaVPTError(f"run={folder}: holds no run (config.yaml is missing)")
    with reading(f"{file}: not a readable configuration", "restore the file that the run wrote"):
        check_yaml(file.read_text(encoding="utf-8"))
        config = OmegaConf.load(file)
        if not isinstance(config, DictConfig):
            raise MetaVPTError(f"{file}: not a configuration of a run, which is a mapping")
        check(config, allow_targets)
        OmegaConf.resolve(config)
        return config


def allowed(option: str) -> list[str]:
    """The names in `option`=[...] of the command line; a file cannot give this option."""
    found: list[str] = []
    for text in _command_line():
        if text.partition("=")[0].lstrip("+") == option:
            value: Any = OverridesParser.create().parse_override(text).value()
            found = [str(name) for name in value] if isinstance(value, list) else [str(value)]
    return found


def _command_line() -> Sequence[str]:
    """The overrides that the user typed: those of the command, else those being composed."""
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


# What follows goes into OmegaConf: interpolations that grow, and those that read the environment.


@contextmanager
def _one_allowance() -> Iterator[None]:
    """All interpolations in the block share one allowance; otherwise every value has its own."""
    token = _spent.set([0])
    try:
        yield
    finally:
        _spent.reset(token)


def _visit_interpolation(self: GrammarVisitor, ctx: Any) -> Any:
    """Evaluate an interpolation, within what the value that it belongs to may still come to."""
    spent = _spent.get() or self.__dict__.setdefault("spent", [0])
    token = _spent.set(spent)
    try:
        value = _evaluate(self, ctx)
    finally:
        _spent.reset(token)
    spent[0] += INTERPOLATION + len(str(value))
    if spent[0] > MAX_GROWTH:
        raise MetaVPTError("the interpolations of the configuration make far too much of it")
    return value


def _environment(key: str, *default: Any) -> str | None:
    """`${oc.env:KEY}`, where the command line allows it by its own use of it or by `allow_env`."""
    typed = re.compile(rf"oc\.env:\s*{re.escape(key)}\b")
    if key in allowed("allow_env") or any(typed.search(text) for text in _command_line()):
        return oc.env(key, *default)
    raise MetaVPTError(
        f"the configuration reads the environment variable {key}, whose value would be written "
        f"into config.yaml and the report; if it may, say allow_env=[{key}] on the command line"
    )


_evaluate = GrammarVisitor.visitInterpolation
GrammarVisitor.visitInterpolation = _visit_interpolation
OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


# What follows goes into Hydra: files that grow, that lead elsewhere, or that configure Hydra.


class FileConfigSource(file_config_source.FileConfigSource):  # Hydra knows sources by this name
    """Configurations in a folder: of the user, or of others."""

    def load_config(self, config_path: str) -> ConfigResult:
        """The configuration, once its text has been found harmless."""
        folder = Path(self.path).resolve()
        file = (folder / self._normalize_file_name(config_path)).resolve()
        if file.is_file():
            if folder not in file.parents:
                raise MetaVPTError(f"{config_path}: leads out of the folder {folder}")
            with reading(f"{file}: not a readable configuration", "repair the file"):
                check_yaml(file.read_text(encoding="utf-8", errors="replace"))
        return super().load_config(config_path)


class ConfigLoader(ConfigLoaderImpl):
    """Hydra's loader, which knows what the command line allows and keeps files out of `hydra`."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], *args: Any, **options: Any
    ) -> DictConfig:
        """As Hydra does; `overrides` are those of the command line."""
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
