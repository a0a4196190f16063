"""`python -m metavpt.debug`."""

from metavpt.cli.main import start

if __name__ == "__main__":
    start("debug")
