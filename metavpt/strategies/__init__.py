"""Strategies: fixed, learned, selection, tilted targets, function space, and controls."""
