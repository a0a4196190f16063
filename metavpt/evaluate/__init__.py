"""`python -m metavpt.evaluate`: any weights, scored as a run scores its learner."""
