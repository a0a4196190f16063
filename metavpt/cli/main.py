"""The console script: `metavpt run|compare|check|bench|export|report|debug ...`."""

import runpy
import sys

COMMANDS = ("run", "compare", "check", "bench", "export", "report", "debug")


def main() -> None:
    """Run the command that the first argument names, as `python -m metavpt.<command>` does."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        print(f"usage: metavpt {{{','.join(COMMANDS)}}} [key=value ...]", file=sys.stderr)
        sys.exit(0 if name in {"-h", "--help"} else 2)
    del sys.argv[1]
    runpy.run_module(f"metavpt.{name}", run_name="__main__", alter_sys=True)
