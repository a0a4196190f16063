"""`python -m metavpt.run`."""

from metavpt.cli.one_line_errors import run_command
from metavpt.run.command import main

if __name__ == "__main__":
    run_command(main)
