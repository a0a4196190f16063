"""`python -m metavpt.check`."""

from metavpt.check.command import main
from metavpt.cli.one_line_errors import run_command

if __name__ == "__main__":
    run_command(main)
