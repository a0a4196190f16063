"""Error reports of the commands: one line and status 2 for user errors, a traceback for bugs."""

import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
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
from metavpt.errors import MetaVPTError, missing_extra

PLUGINS = {  # choices that need a plugin -> the extra that installs it
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/ray": "ray",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/submitit_slurm": "slurm",
}

WITH_VALUE = {  # Hydra's options that the next argument belongs to
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"),
    *("--cfg", "-c", "--package", "-p", "--experimental-rerun"),
}

USER_ERRORS = (MetaVPTError, HydraException, OmegaConfBaseException, YAMLError, UnicodeError)


def run_command(main: Callable[[], object]) -> None:
    """Run `main`, a Hydra entry point, and report its errors as in `reporting`."""
    # Hydra then raises its errors instead of printing a page and exiting with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.excepthook = _print_traceback
    sys.argv[1:] = options_first(sys.argv[1:])
    with reporting():
        main()


def options_first(arguments: Sequence[str]) -> list[str]:
    """Move `--options` with their values before the overrides: Hydra takes none after them."""
    options: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
        elif argument in WITH_VALUE:
            options += [argument, *itertools.islice(rest, 1)]
        else:
            options.append(argument)
    return options + overrides


def _print_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print a traceback as Python does, with control characters escaped."""
    sys.stderr.write(printable("".join(format_exception(kind, error, trace))))


@contextmanager
def reporting() -> Iterator[None]:
    """Exit with status 2 and one line on bad input, and with 130 on Ctrl-C.

    Jobs of a command use it too, since Hydra adds its own lines to an exception that leaves a job.
    """
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
    """Describe an exception in one line: as in `reporting` for bad input, else with its type."""
    cause = _user_error(error) if isinstance(error, USER_ERRORS) else None
    return " ".join((cause or f"{type(error).__name__}: {error}").split())


def _user_error(error: BaseException) -> str | None:
    """Return the line to print. None: the error is not the user's."""
    if isinstance(error, RuntimeError):
        return dead_worker(str(error))
    if isinstance(error, UnicodeDecodeError):
        return _not_text(error)
    if isinstance(error, UnicodeEncodeError):
        return _not_a_name(error)
    if ours := own_error(error):
        return str(ours)
    chain = _chain(error)
    if isinstance(error, MissingConfigException):
        return _missing_config(str(error))
    if isinstance(error, ConfigCompositionException):
        return _unknown_key([str(link) for link in chain])
    if isinstance(error, InstantiationException):
        if missing := next(filter(None, map(missing_extra, chain)), None):
            return str(missing)
        blamed = ("unexpected keyword argument", "locating target", "missing 1 required")
        # The innermost error names the cause.
        lines = [line for link in reversed(chain) for line in str(link).splitlines()]
        return next((line for line in lines if any(words in line for words in blamed)), None)
    return str(error).splitlines()[0]


def own_error(error: BaseException) -> MetaVPTError | None:
    """Return the package's own error inside `error`, since libraries wrap exceptions."""
    return next((link for link in _chain(error) if isinstance(link, MetaVPTError)), None)


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
    return chain


def _not_a_name(error: UnicodeEncodeError) -> str | None:
    """The line for a path that is not valid UTF-8, which Python holds as surrogates.

    None for any other text.
    """
    if error.reason != "surrogates not allowed":
        return None
    before = re.search(r"\S*$", error.object[: error.start])
    after = re.match(r"\S*", error.object[error.start :])
    name = "".join(part[0] for part in (before, after) if part)
    return f"{name}: the name is not valid UTF-8; rename the file or folder"


def _not_text(error: UnicodeDecodeError) -> str | None:
    """Return the line for a configuration file that is not UTF-8. None: another text.

    Hydra's error does not name the file.
    """
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code.co_filename.endswith("file_config_source.py"):
            path, at = frame.f_locals.get("full_path"), f"{error.reason} at byte {error.start}"
            return f"{path}: not UTF-8 text ({at}); fix or replace the file"
    return None


def dead_worker(message: str) -> str | None:
    """Return the line for torch's RuntimeError about a dead data worker. None: another error.

    torch raises it in the middle of any computation.
    """
    worker = re.search(
        r"DataLoader worker \(pid.*?\) (?:is killed by signal: [^.]*|exited unexpectedly[^.]*)",
        message,
    )
    if worker is None:
        return None
    return f"{worker[0]}: out of memory, or a bug in the data set; try problem.num_workers=0"


def _missing_config(message: str) -> str:
    """Return the line for a choice that does not exist, with the nearest existing one."""
    asked = re.search(r"Could not (?:find|load) '([^']+)/([^']+)'", message)
    options = re.findall(r"^\t(\S+)$", message, flags=re.MULTILINE)
    if not asked:
        return message.splitlines()[0]
    group, name = asked.groups()
    if extra := PLUGINS.get(f"{group}/{name}"):
        return f"{group}={name}: the package is missing; pip install 'metavpt[{extra}]'"
    near = difflib.get_close_matches(name, options, n=1)
    hint = f" did you mean {group}={near[0]}?" if near else ""
    return f"{group}={name}: no such choice;{hint} known: {', '.join(options)}"


def _unknown_key(messages: list[str]) -> str:
    """Return the line for an unknown key, with the nearest valid one."""
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
    """Return the valid option nearest to `key`, in the configuration with the other overrides."""
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
            child: Any = node._get_node(name)
            if OmegaConf.is_dict(child) and not child._is_none():
                collect(child, f"{prefix}{name}.")

    collect(config, "")
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    return near[0] if near else None
