"""Probes: metrics of frozen features and of language models."""
