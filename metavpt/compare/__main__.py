"""`python -m metavpt.compare`."""

from metavpt.cli.main import start

if __name__ == "__main__":
    start("compare")
