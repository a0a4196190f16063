"""`python -m metavpt.export`: the trained learner in formats that others read."""
