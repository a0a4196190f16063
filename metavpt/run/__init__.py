"""`python -m metavpt.run`: one run, from step 0 to its report; with -m a sweep."""
