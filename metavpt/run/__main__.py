"""`python -m metavpt.run`."""

from metavpt.cli.main import start

if __name__ == "__main__":
    start("run")
