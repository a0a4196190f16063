"""The console script: `metavpt run|compare|check|evaluate|export|report|bench|debug ...`."""

import runpy
import sys
from importlib import import_module

from metavpt.cli.console import say
from metavpt.errors import missing_extra

COMMANDS = ("run", "compare", "check", "evaluate", "export", "report", "bench", "debug")


def main() -> None:
    """Run the command that the first argument names, as `python -m metavpt.<command>` does."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(f"usage: metavpt {{{','.join(COMMANDS)}}} [key=value ...]", file=sys.stderr)
        sys.exit(0 if name in {"-h", "--help"} else 2)
    del sys.argv[1]
    runpy.run_module(f"metavpt.{name}", run_name="__main__", alter_sys=True)


def start(name: str) -> None:
    """Run a command by `run_command`; where its extra is not installed, exit with one line."""
    try:
        errors = import_module("metavpt.cli.one_line_errors")
        command = import_module(f"metavpt.{name}.command")
    except ModuleNotFoundError as error:
        if missing := missing_extra(error):
            say("error", str(missing), "bold red")
            sys.exit(2)
        raise
    errors.run_command(command.main)
