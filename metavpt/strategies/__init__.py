"""Strategies: who chooses the next task (fixed, learned, selection, tilted targets, function space, controls)."""
