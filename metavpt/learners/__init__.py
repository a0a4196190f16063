"""Learners: vision transformers and language models as trunk and tail, EMA teachers, weights."""
