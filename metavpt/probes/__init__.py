"""Probes: metrics of frozen vision features and of language models.

Letters for shapes: M images of a labelled set, N vectors, B images of a batch, D feature width,
C classes or outputs, H W pixels, h w patches, T tokens.
"""
