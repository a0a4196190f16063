"""`python -m metavpt.bench`."""

from metavpt.cli.main import start

if __name__ == "__main__":
    start("bench")
