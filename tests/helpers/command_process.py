"""`python -m metavpt.<command>` in a forked process that has imported torch, to start fast."""

import multiprocessing as mp
import os
import resource
import sys
from importlib import import_module
from pathlib import Path

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["metavpt.run.command", "metavpt.problems.sources", "torch._dynamo"])


def start(folder, *options, module="run", file_limit=None, environment=None):
    """The started process; what it prints goes to folder/output.txt.

    Args:
        folder: Its working directory.
        options: The command line.
        module: The command.
        file_limit: Its disk, in bytes: no file may grow beyond.
        environment: Variables to set.
    """
    process = CONTEXT.Process(
        target=_work, args=(str(folder), module, options, file_limit, environment)
    )
    process.start()
    return process


def finish(folder, *options, seconds=120, **how):
    """Status and output of the command, run to its end within `seconds`."""
    process = start(folder, *options, **how)
    process.join(seconds)
    assert process.exitcode is not None, "the command hangs"
    return process.exitcode, (Path(folder) / "output.txt").read_text()


def _work(folder, module, options, file_limit, environment):
    from metavpt.cli.one_line_errors import run_command

    os.chdir(folder)
    os.environ.update(environment or {})
    with open("output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [module, *options]
    run_command(import_module(f"metavpt.{module}.command").main)
