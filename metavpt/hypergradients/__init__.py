"""Hypergradients of a feedback loss: estimators, the mixed products they are made of, directions, linear solvers."""
