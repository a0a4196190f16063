"""What the commands share: one clear line and exit status 2 for what a user can mend, a traceback for what is our fault."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import format_exception, walk_tb
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from metavpt.cli.console import printable, say
from metavpt.errors import MetaVPTError

PLUGINS = {  # choices that come with a package of their own -> the extra that installs it
    "hydra/sweeper/optuna": "optuna",
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
}

USER_ERRORS = (MetaVPTError, HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError)


def run_command(main: Callable[[], object]) -> None:
    """Run `main`, a hydra entry point, with its own errors reported as `reporting` does."""
    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # hydra then raises its errors instead of printing a page and exiting with 1
    )
    sys.excepthook = _print_traceback
    with reporting():
        main()


def _print_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Python's own hook, for messages that may quote names from files."""
    sys.stderr.write(printable("".join(format_exception(kind, error, trace))))


@contextmanager
def reporting() -> Iterator[None]:
    """Exit with status 2 and one line on bad input, 130 on Ctrl-C. Jobs use it too: hydra adds lines of its own to what leaves one."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except (*USER_ERRORS, RuntimeError) as error:
        cause = _user_error(error)
        if cause is None:
            raise
        say("error", cause, "bold red")
        sys.exit(2)


def reason(error: BaseException) -> str:
    """One line of why something failed: as `reporting` has it for bad input, the kind of error and its message for anything else."""
    cause = _user_error(error) if isinstance(error, USER_ERRORS) else None
    return " ".join((cause or f"{type(error).__name__}: {error}").split())


def _user_error(error: BaseException) -> str | None:
    """The line to print; None for an error inside a constructor that is no fault of the configuration."""
    if isinstance(error, RuntimeError):
        return dead_worker(str(error))
    if isinstance(error, UnicodeDecodeError):
        return _not_text(error)
    if ours := own_error(error):
        return str(ours)
    chain = _chain(error)
    if isinstance(error, MissingConfigException):
        return _missing_config(str(error))
    if isinstance(error, ConfigCompositionException):
        return _unknown_key([str(link) for link in chain])
    if isinstance(error, InstantiationException):
        blamed = ("unexpected keyword argument", "locating target")
        lines = [
            line for link in reversed(chain) for line in str(link).splitlines()
        ]  # the innermost first: it names what is wrong
        return next((line for line in lines if any(words in line for words in blamed)), None)
    return str(error).splitlines()[0]


def own_error(error: BaseException) -> MetaVPTError | None:
    """The package's own error that `error` stands for: libraries wrap what is raised within them."""
    return next((link for link in _chain(error) if isinstance(link, MetaVPTError)), None)


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
    return chain


def _not_text(error: UnicodeDecodeError) -> str | None:
    """The line for a configuration file that hydra could not decode, which its error does not name; None for any other text."""
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code.co_filename.endswith("file_config_source.py"):
            return f"{frame.f_locals.get('full_path')}: not text in UTF-8 ({error.reason} at byte {error.start}); repair the file"
    return None


def dead_worker(message: str) -> str | None:
    """The line for a RuntimeError that torch raises, in the middle of whatever runs, when a loading process has died; None for others."""
    worker = re.search(
        r"DataLoader worker \(pid.*?\) (?:is killed by signal: [^.]*|exited unexpectedly[^.]*)",
        message,
    )
    return (
        f"{worker[0]}: out of memory, or a fault in what reads the data; try problem.num_workers=0"
        if worker
        else None
    )


def _missing_config(message: str) -> str:
    """`problem=foo` -> the nearest of the names that exist."""
    asked = re.search(r"Could not (?:find|load) '([^']+)/([^']+)'", message)
    options = re.findall(r"^\t(\S+)$", message, flags=re.MULTILINE)
    if not asked:
        return message.splitlines()[0]
    group, name = asked.groups()
    if extra := PLUGINS.get(f"{group}/{name}"):
        return f"{group}={name} comes with a package that is not installed; pip install 'metavpt[{extra}]'"
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"did you mean {group}={near[0]}?" if near else ""
    return f"{group}={name}: no such choice; {hint} known: {', '.join(options)}".replace(
        ";  ", "; "
    )


def _unknown_key(messages: list[str]) -> str:
    """An unknown key, with the nearest valid one from hydra's own list of what is there."""
    text = "\n".join(messages)
    key = re.search(r"Could not override '([^']+)'", text) or re.search(
        r"Key '([^']+)' is not in struct", text
    )
    if not key:
        return " ".join(messages[0].split())
    near = nearest_key(key[1])
    return f"{key[1]}: no such option" + (
        f"; did you mean {near}?" if near else "; --cfg job prints all of them"
    )


def nearest_key(key: str) -> str | None:
    """The valid option nearest to `key`, among those of the configuration with its other overrides."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import initialize_config_module
    from omegaconf import DictConfig, OmegaConf

    GlobalHydra.instance().clear()
    others = [
        argument
        for argument in sys.argv[1:]
        if "=" in argument and not argument.startswith((key, "-"))
    ]
    try:
        with initialize_config_module("metavpt.configs", version_base="1.3"):
            config = compose("run", overrides=others)
    except (HydraException, OmegaConfBaseException):
        return None
    names: list[str] = []

    def collect(node: DictConfig, prefix: str) -> None:
        for name in node:
            names.append(f"{prefix}{name}")
            if OmegaConf.is_dict(child := node._get_node(name)) and not child._is_none():  # type: ignore[union-attr]
                collect(child, f"{prefix}{name}.")  # type: ignore[arg-type]

    collect(config, "")
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return near[0] if near else None
