"""`python -m metavpt.report`."""

from metavpt.cli.main import start

if __name__ == "__main__":
    start("report")
