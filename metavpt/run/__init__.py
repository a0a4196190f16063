"""`python -m metavpt.run`: one training run and its report; with -m a sweep."""
