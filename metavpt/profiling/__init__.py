"""Timers of the phases of a step, and the peak of memory: what every module may use to name where time goes."""
