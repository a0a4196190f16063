"""`python -m metavpt.compare`: strategies at equal cost, with paired statistics."""
