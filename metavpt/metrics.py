"""Which way is better for a metric: stated by a probe, a problem or a configuration."""

from collections.abc import Mapping
from typing import Any, Literal

from metavpt.errors import MetaVPTError

Direction = Literal["lower", "higher"]  # the values of a metric that are better
Directions = Mapping[str, Direction]

SIGNS: dict[str, int] = {"lower": -1, "higher": 1}


def sign(name: str, directions: Directions) -> int:
    """Look up the direction of a metric.

    Args:
        name: the metric, such as `ridge/depth_rmse`.
        directions: full names, or what follows their last `/`, to "lower" or "higher".

    Returns:
        -1 where lower is better, +1 where higher is better, 0 where the direction is not stated.
    """
    stated = directions.get(name) or directions.get(name.rsplit("/", 1)[-1])
    return SIGNS[stated] if stated else 0


def check_directions(directions: Mapping[str, Any], where: str) -> dict[str, Direction]:
    """Return a copy of `directions`; raise MetaVPTError for a value that is no direction.

    Args:
        directions: metric to "lower" or "higher".
        where: the key, attribute or file that holds them, for the message.
    """
    for name, stated in directions.items():
        if stated not in SIGNS:
            raise MetaVPTError(
                f"{where}.{name}={stated}: write lower or higher, whichever is better"
            )
    return dict(directions)
