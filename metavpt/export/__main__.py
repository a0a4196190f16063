"""`python -m metavpt.export`."""

from metavpt.cli.one_line_errors import run_command
from metavpt.export.command import main

if __name__ == "__main__":
    run_command(main)
