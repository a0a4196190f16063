"""The folder of a run: never shared with another one, and found again to resume."""

import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from metavpt.cli.console import say
from metavpt.cli.yaml_size import check_yaml
from metavpt.errors import MetaVPTError, reading, writing
from metavpt.training import disk
from metavpt.training.checkpoint import Checkpoints
from metavpt.training.disk import write_text
from metavpt.training.run_state import difference

LOCK = ".lock"  # in the folder of a run, locked by the process at work there
PACKAGES = ("metavpt", "torch", "torchvision", "timm", "kornia", "hydra-core", "numpy")

_locks: dict[Path, IO[bytes]] = {}


def create(folder: Path | None, parent: Path, name: str) -> Path:
    """Make a new, empty folder for a run and lock it, see `lock`.

    Args:
        folder: The folder itself, which may exist if it is empty.
        parent: Where to make <name>-<time>, numbered where that is taken, if `folder` is None.
        name: The beginning of the name in `parent`.

    Raises:
        MetaVPTError: `folder` is not empty, or cannot be made, or its name is not UTF-8.
    """
    _check_name(parent if folder is None else folder)
    if folder is not None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _check_empty(folder)
            lock(folder)
            _check_empty(folder)
        return folder
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1000):
        path = parent / (stem if attempt == 0 else f"{stem}-{attempt + 1}")
        with writing(path):
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                if parent.is_dir():
                    continue
                raise
            lock(path)
        return path
    raise MetaVPTError(f"{parent}: could not make a new folder for {stem}")


def _check_name(folder: Path) -> None:
    """Check that the name can be written into reports. Python holds other bytes as surrogates."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise MetaVPTError(f"{folder}: not a UTF-8 name; choose another folder") from None


def _check_empty(folder: Path) -> None:
    if any(path.name != LOCK for path in folder.iterdir()):
        raise MetaVPTError(
            f"output={folder}: the folder is not empty; choose another one, or continue that run "
            "with resume=true"
        )


def remove(folder: Path) -> None:
    """Delete what this process wrote into a folder, and the folder itself unless it is a link.

    Errors are ignored: this follows the failure of a run, whose own message must not be lost.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    unlock(folder)
    with suppress(OSError):
        folder.rmdir()


def lock(folder: Path) -> None:
    """Reserve the folder of a run for this process until `unlock`, or until the process ends.

    Raises:
        MetaVPTError: Another process is at work in the folder.
    """
    key = folder.resolve()
    if key in _locks:
        return
    file = (folder / LOCK).open("a+b")
    if not disk.lock(file):
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip()
        file.close()
        raise MetaVPTError(
            f"{folder}: another process is at work in this folder ({holder}); wait for it, or "
            "choose another folder"
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}".encode())
    file.flush()
    _locks[key] = file


def unlock(folder: Path) -> None:
    """Let go of a folder that `lock` reserved, if it did."""
    file = _locks.pop(folder.resolve(), None)
    if file is not None:
        file.close()


def _forget_locks() -> None:
    """Close the lock files of a forked process, which would outlive this process."""
    for file in _locks.values():
        file.close()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def find(folder: Path | None, parent: Path, config: str, may_change: Container[str] = ()) -> Path:
    """Find the folder to resume: `folder`, or the newest one of the same configuration.

    Args:
        folder: The folder itself. None: one in `parent`.
        parent: The folder of runs.
        config: The configuration, YAML.
        may_change: Its sections that may differ.

    Raises:
        MetaVPTError: There is none. The message names the first options that differ.
    """
    candidates = (
        [folder]
        if folder is not None
        else sorted(parent.glob("*/"), key=lambda path: path.stat().st_mtime, reverse=True)
    )
    nearest: str | None = None
    for path in candidates:
        file = path / "config.yaml"
        reason = "holds no run (config.yaml is missing)"
        if file.is_file():
            found = _changed(file, config, may_change)
            if found is None:
                with writing(path):
                    lock(path)
                return path
            reason = f"was made by another configuration ({found})"
            nearest = nearest or f"; {path} differs in {found}"
        if folder is not None:
            raise MetaVPTError(
                f"resume=true output={folder}: the folder {reason}; repeat the options of that run"
            )
    raise MetaVPTError(
        f"resume=true: no run under {parent} has this configuration{nearest or ''}; repeat its "
        "options, or name its folder with output="
    )


def _changed(file: Path, config: str, may_change: Container[str]) -> str | None:
    """Describe what differs between the configuration in a file and `config`. None: nothing."""
    import yaml  # of the extra `run`

    text = file.read_text(encoding="utf-8", errors="replace")
    if text == config:
        return None
    with reading(f"{file}: not a readable configuration", "restore the file that the run wrote"):
        check_yaml(text)
        before, now = (dict(_options(yaml.safe_load(one))) for one in (text, config))
    for options in (before, now):
        for key in [key for key in options if key.partition(".")[0] in may_change]:
            del options[key]
    return difference(before, now)


def _options(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of a configuration."""
    if isinstance(node, dict | list) and node:
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _options(value, f"{key}.{name}".lstrip("."))
    else:
        yield key, node


def newest_state(run: Path) -> tuple[dict[str, Any], Path]:
    """What the newest checkpoint of `run` that can be read holds of the problem, and its file.

    What is passed over is said on stderr.
    """
    state, path, unreadable = Checkpoints(run / "checkpoints").newest()
    for line in unreadable:
        say("warning:", f"{line}; {path.name} is taken", "yellow")
    return state.get("problem", {}), path


def write_environment(
    folder: Path,
    seed: int | None = None,
    command: str = "run",
    also: Sequence[str] = (),
    choices: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> None:
    """Write environment.json: the command, versions, machine and threads.

    Args:
        folder: The folder of the run.
        seed: The seed of the run, if it has one.
        command: The name of the command.
        also: Arguments that were taken out of the command line.
        choices: Configuration groups such as `strategy` to their choices as they were typed.
        threads: Of the run. Default: those of this process.
    """
    environment = {
        **(choices or {}),
        "command": shlex.join(["python", "-m", f"metavpt.{command}", *sys.argv[1:], *also]),
        "seed": seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": threads or torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{package: _version(package) for package in PACKAGES},
    }
    write_text(folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def resume_command(command: str, place: str, also: Sequence[str] = ()) -> str:
    """Return the command that continues what this process began.

    Args:
        command: The name of the command.
        place: The option that names the folder, as in `output=runs/x`.
        also: Arguments that were taken out of the command line.
    """
    replaced = ("resume=", place.partition("=")[0] + "=")
    options = [option for option in sys.argv[1:] if not option.startswith(replaced)]
    return shlex.join(["python", "-m", f"metavpt.{command}", *options, *also, place, "resume=true"])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
