"""`python -m metavpt.debug`: run a failed step again and show where it stops being finite."""
