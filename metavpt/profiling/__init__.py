"""Timers of the phases of a step, and peak memory."""
