"""Readers of data sets: images, labelled frames, text; generated rooms and arithmetic."""
