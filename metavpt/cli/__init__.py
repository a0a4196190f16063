"""Shared parts of the commands: one-line errors, the console, and checked configurations."""
