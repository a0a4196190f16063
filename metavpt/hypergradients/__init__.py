"""Hypergradients of a feedback loss: estimators, mixed products, directions, linear solvers."""
