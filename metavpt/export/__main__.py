"""`python -m metavpt.export`."""

from metavpt.cli.main import start

if __name__ == "__main__":
    start("export")
