"""Procedural textures of generated rooms: a colour for each point of a surface, in metres."""

from dataclasses import dataclass

import numpy as np

KINDS = ("plain", "stripes", "checker", "bricks", "waves", "spots")


@dataclass(frozen=True)
class Texture:
    """Two colours mixed by a pattern of `scale` metres, turned by `angle`."""

    kind: str
    colours: np.ndarray  # (2,3)
    scale: float
    angle: float
    phases: np.ndarray  # (4,3): frequency in each coordinate and phase of the waves

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Texture":
        """Draw a texture."""
        base = rng.uniform(0.15, 0.95, 3)
        other = np.clip(base + rng.normal(0, 0.25, 3), 0.05, 1)
        phases = np.concatenate(
            [rng.normal(0, 1.5, (4, 2)), rng.uniform(0, 2 * np.pi, (4, 1))], axis=1
        ).astype(np.float32)
        colours = np.stack([base, other]).astype(np.float32)
        return cls(
            str(rng.choice(KINDS)), colours, rng.uniform(0.08, 0.6), rng.uniform(0, np.pi), phases
        )

    @classmethod
    def plain(cls, colour: np.ndarray) -> "Texture":
        """Return a texture of one colour."""
        return cls(
            "plain",
            np.stack([colour, colour]).astype(np.float32),
            1.0,
            0.0,
            np.zeros((4, 3), dtype=np.float32),
        )

    def __call__(self, uv: np.ndarray) -> np.ndarray:
        """Map coordinates (P, 2) to colours (P, 3) in [0, 1]."""
        mix = self._pattern(uv / self.scale)[:, None]
        return (1 - mix) * self.colours[0] + mix * self.colours[1]

    def _pattern(self, uv: np.ndarray) -> np.ndarray:
        """(P,) in [0,1]."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        u, v = uv[:, 0], uv[:, 1]
        grain = 0.5 + 0.5 * np.sin(uv @ self.phases[:, :2].T * 2 + self.phases[:, 2]).mean(axis=1)
        if self.kind == "stripes":
            return (np.floor(cos * u + sin * v) % 2) * 0.8 + 0.2 * grain
        if self.kind == "checker":
            return ((np.floor(u) + np.floor(v)) % 2) * 0.8 + 0.2 * grain
        if self.kind == "bricks":
            row = np.floor(v * 2)
            mortar = (v * 2 % 1 < 0.12) | ((u + 0.5 * (row % 2)) % 1 < 0.06)
            return np.where(mortar, 1.0, 0.3 * grain)
        if self.kind == "waves":
            return grain
        if self.kind == "spots":
            return ((u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09) * 0.8 + 0.2 * grain
        return 0.25 * grain
