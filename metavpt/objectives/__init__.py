"""Pretraining losses: DINO, iBOT, KoLeo, MAE, I-JEPA, data2vec, next token."""
