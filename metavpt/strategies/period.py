"""When a strategy updates what it learns."""

from dataclasses import dataclass

from metavpt.errors import MetaVPTError


@dataclass(frozen=True)
class Period:
    """Every `every` steps, from step `burn_in` on."""

    every: int = 8
    burn_in: int = 0

    def __post_init__(self) -> None:
        if self.every < 1 or self.burn_in < 0:
            raise MetaVPTError(
                f"strategy: every={self.every} must be at least 1 and "
                f"burn_in={self.burn_in} at least 0"
            )

    def due(self, step: int) -> bool:
        """Return whether an update comes before this step."""
        return step >= self.burn_in and step % self.every == 0
