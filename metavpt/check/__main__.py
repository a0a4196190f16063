"""`python -m metavpt.check`."""

from metavpt.cli.main import start

if __name__ == "__main__":
    start("check")
