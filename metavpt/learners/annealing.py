"""The half cosine that learning rates and the EMA momentum follow."""

import math


def cosine(start: float, end: float, progress: float) -> float:
    """Anneal from `start` to `end` along half a cosine.

    Args:
        start: Value at progress 0.
        end: Value from progress 1 on.
        progress: Share of the way, at least 0.

    Returns:
        end - (end - start) * (1 + cos(pi * progress)) / 2.
    """
    return end - (end - start) * (1.0 + math.cos(math.pi * min(progress, 1.0))) / 2.0
