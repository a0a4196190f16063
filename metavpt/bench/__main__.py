"""`python -m metavpt.bench`."""

from metavpt.bench.command import main
from metavpt.cli.one_line_errors import run_command

if __name__ == "__main__":
    run_command(main)
