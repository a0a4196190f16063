"""`python -m metavpt.evaluate`."""

from metavpt.cli.main import start

if __name__ == "__main__":
    start("evaluate")
