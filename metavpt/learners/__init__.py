"""Learners: vision transformers and language models, cut into trunk and tail; EMA teachers; weights."""
