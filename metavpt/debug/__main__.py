"""`python -m metavpt.debug`."""

from metavpt.cli.one_line_errors import run_command
from metavpt.debug.command import main

if __name__ == "__main__":
    run_command(main)
