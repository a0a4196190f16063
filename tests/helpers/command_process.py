"""`python -m metavpt.<command>` in a forked process that has imported torch, to start fast.

As after a start of Python, the process has its own working directory, environment, sys.path,
standard output and error, and exit status. Other than there, modules are imported before the
environment is set: a variable that a library reads at import needs a start of Python.
"""

import atexit
import gc
import multiprocessing as mp
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
WITH_EXAMPLES = {"PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1"}
TOGETHER = ("output.txt", "output.txt")
OF_TESTS = {str(ROOT / "tests"), str(EXAMPLES)}  # pytest has them on sys.path, a command has not
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *(f"metavpt.{name}.command" for name in ("run", "compare", "check", "bench", "debug")),
        *(f"metavpt.problems.{name}" for name in ("sources", "dino_dense", "lm_gsm8k")),
        *("torch._dynamo", "torch.func", "timm", "h5py", "matplotlib.backends.backend_svg"),
    ]
)


def start(folder, *options, module="run", file_limit=None, environment=None, printed=TOGETHER):
    """The started process.

    Args:
        folder: Its working directory.
        options: The command line.
        module: The command.
        file_limit: Its disk, in bytes: no file may grow beyond.
        environment: Variables to set.
        printed: Files for standard output and error, in its folder.
    """
    variables = {**os.environ, **(environment or {})}
    for path in printed:
        (Path(folder) / path).write_text("")
    process = CONTEXT.Process(
        target=_work, args=(str(folder), module, options, file_limit, variables, printed)
    )
    process.start()
    return process


def finish(folder, *options, seconds=600, **how):
    """Status and output of the command, run to its end within `seconds`."""
    process = start(folder, *options, **how)
    _join(process, seconds)
    return process.exitcode, (Path(folder) / "output.txt").read_text()


def run(folder, *options, seconds=600, **how):
    """The finished command as from subprocess.run; its output leaves no file in the folder."""
    with tempfile.TemporaryDirectory() as beside:
        printed = [str(Path(beside) / name) for name in ("out", "err")]
        process = start(folder, *options, printed=printed, **how)
        _join(process, seconds)
        out, err = (Path(path).read_text() for path in printed)
    return subprocess.CompletedProcess(options, process.exitcode, out, err)


def _join(process, seconds):
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the command hangs")


def _work(folder, module, options, file_limit, variables, printed):
    gc.freeze()  # what was imported is not looked through again
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    own = filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [os.getcwd(), *own, *(path for path in sys.path if path not in OF_TESTS)]
    for path, stream in zip(printed, (1, 2), strict=True):
        with open(path, "a") as output:
            os.dup2(output.fileno(), stream)
    if threads := variables.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    if module == "compare":  # its jobs are forked from this process, not from a new one
        with mock.patch("multiprocessing.util.spawnv_passfds", _fork):
            forkserver.ensure_running()
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [module, *options]
    try:
        runpy.run_module(f"metavpt.{module}", run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def _fork(path, arguments, kept):
    """As util.spawnv_passfds: start a process that has the files `kept` alone, here by a fork."""
    if pid := os.fork():
        return pid
    keep = {0, 1, 2, *kept}
    for name in os.listdir("/dev/fd"):
        if (number := int(name)) not in keep:
            with suppress(OSError):  # the one that listed them is closed
                os.close(number)
    signal.set_wakeup_fd(-1)
    try:
        exec(arguments[-1], {})
    finally:
        os._exit(0)
