"""`python -m metavpt.report`."""

from metavpt.report.command import main

if __name__ == "__main__":
    main()
