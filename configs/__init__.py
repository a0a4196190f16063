"""Configurations that Hydra composes."""
