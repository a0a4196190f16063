"""`python -m metavpt.bench`: where the time and memory of a step go."""
