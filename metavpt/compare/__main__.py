"""`python -m metavpt.compare`."""

import re
import sys

from metavpt.cli.one_line_errors import run_command
from metavpt.compare import command

if __name__ == "__main__":
    command.shared += [option for option in sys.argv[1:] if re.match(r"strategy\.", option)]
    sys.argv = [sys.argv[0], *(option for option in sys.argv[1:] if option not in command.shared)]
    run_command(command.main)
