"""Generated RGB-D rooms: a small data set with metric depth and classes that looks like rooms.

Every frame is its own room, ray-cast analytically: textured walls, floor and ceiling, furniture
(boxes turned about the vertical), balls, pictures, windows and a door on the walls, and a lamp.
Colours and textures are drawn independently of the class, so that depth and classes must be read
from shape and context.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from rich.progress import track

from metavpt.data.cache import cache_folder
from metavpt.errors import MetaVPTError

CLASS_NAMES = [
    "wall",
    "floor",
    "ceiling",
    "table",
    "chair",
    "bed",
    "sofa",
    "cabinet",
    "picture",
    "window",
    "door",
    "ball",
    "lamp",
]
CLASS = {name: i for i, name in enumerate(CLASS_NAMES)}
MIN_DEPTH, MAX_DEPTH = 0.5, 10.0
TRAIN_SHARE = 0.8
PATTERNS = ("plain", "stripes", "checker", "bricks", "waves", "spots")  # of textures

# width, depth, height in metres of each kind of furniture, as (low, high)
FURNITURE = {
    "table": ((0.8, 1.6), (0.6, 1.0), (0.68, 0.78)),
    "chair": ((0.4, 0.55), (0.4, 0.55), (0.8, 1.0)),
    "bed": ((1.4, 2.0), (1.9, 2.1), (0.4, 0.6)),
    "sofa": ((1.4, 2.2), (0.8, 1.0), (0.7, 0.9)),
    "cabinet": ((0.6, 1.4), (0.35, 0.6), (0.9, 2.1)),
}
# width and height of what hangs or stands on a wall, and the height of its lower edge
DECALS = {
    "picture": ((0.4, 1.2), (0.3, 0.9), (1.2, 1.5)),
    "window": ((0.8, 1.8), (0.8, 1.3), (0.8, 1.0)),
    "door": ((0.8, 1.0), (1.95, 2.1), (0.0, 0.0)),
}


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
            str(rng.choice(PATTERNS)),
            colours,
            rng.uniform(0.08, 0.6),
            rng.uniform(0, np.pi),
            phases,
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


class Surface(NamedTuple):
    """What P rays meet of one thing: the distance (P,) along each, infinite for a miss.

    `at(seen)` gives unit normals (S,3) and texture coordinates (S,2), in metres, for the S rays of
    the mask `seen` (P,).
    """

    distance: np.ndarray
    at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    label: int
    texture: Texture


def generate_room(
    rng: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One frame: image uint8 (H, W, 3), depth float32 (H, W) in metres, raw label uint16 (H, W)."""
    # x, y (mostly away from the camera), z up
    room = rng.uniform((3.0, 3.5, 2.3), (6.5, 8.0, 3.0)).astype(np.float32)
    eye = np.array(
        [
            rng.uniform(0.25, 0.75) * room[0],
            rng.uniform(0.08, 0.3) * room[1],
            rng.uniform(1.1, 1.7),
        ],
        dtype=np.float32,
    )
    rays, forward = _camera_rays(rng, size)
    lamp = np.array(
        [*(rng.uniform(0.25, 0.75, 2) * room[:2]), room[2] - rng.uniform(0.15, 0.5)],
        dtype=np.float32,
    )
    surfaces = [
        *_shell(rng, room, eye, rays),
        *_furniture(rng, room, eye, rays),
        *_balls(rng, room, eye, rays, lamp),
    ]

    distances = np.stack([surface.distance for surface in surfaces])
    nearest = distances.argmin(axis=0)
    distance = distances.min(axis=0)
    normal = np.empty_like(rays)
    colour = np.empty_like(rays)
    for i, surface in enumerate(surfaces):
        seen = nearest == i
        if seen.any():
            normal[seen], uv = surface.at(seen)
            colour[seen] = surface.texture(uv)
    labels = np.array([surface.label for surface in surfaces])[nearest]
    image = _shade(
        rng, eye + distance[:, None] * rays, normal, colour, lamp, labels == CLASS["lamp"]
    )
    depth = np.clip(distance * (rays @ forward), MIN_DEPTH, MAX_DEPTH)
    return (
        image.reshape(*size, 3),
        depth.reshape(size).astype(np.float32),
        (labels + 1).reshape(size).astype(np.uint16),
    )


def _camera_rays(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return unit rays (P, 3), row by row, and the optical axis, with a Kinect's field of view."""
    height, width = size
    focal = width / 2 / np.tan(np.radians(rng.uniform(56, 66)) / 2)
    yaw, pitch = rng.uniform(-0.6, 0.6), np.radians(rng.uniform(-28, 2))
    forward = np.array([np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), np.sin(pitch)])
    right = np.array([np.cos(yaw), -np.sin(yaw), 0.0])
    up = np.cross(right, forward)
    x = (np.arange(width) + 0.5 - width / 2) / focal
    y = (height / 2 - np.arange(height) - 0.5) / focal
    rays = forward + x[None, :, None] * right + y[:, None, None] * up
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    return rays.reshape(-1, 3).astype(np.float32), forward.astype(np.float32)


def _shell(
    rng: np.random.Generator, room: np.ndarray, eye: np.ndarray, rays: np.ndarray
) -> Iterator[Surface]:
    """Floor, ceiling, and walls with what is on them."""
    wall_texture = Texture.random(rng)
    for axis in range(3):
        for side in (0.0, room[axis]):
            with np.errstate(divide="ignore"):
                distance = (side - eye[axis]) / rays[:, axis]
            distance = np.where(
                (distance > 0) & np.isfinite(distance), distance, np.float32(np.inf)
            )
            others = [i for i in range(3) if i != axis]
            normal = np.zeros(3, dtype=np.float32)
            normal[axis] = 1.0 if side == 0 else -1.0

            def at(
                seen: np.ndarray,
                distance: Any = distance,
                others: Any = others,
                normal: Any = normal,
            ) -> tuple[np.ndarray, np.ndarray]:
                return np.broadcast_to(normal, (int(seen.sum()), 3)), eye[others] + distance[
                    seen, None
                ] * rays[seen][:, others]

            label = CLASS["wall"] if axis < 2 else CLASS["floor"] if side == 0 else CLASS["ceiling"]
            wall = Surface(distance, at, label, wall_texture if axis < 2 else Texture.random(rng))
            yield wall
            if axis < 2:
                yield from _decals(rng, wall, room[others[0]])


def _decals(rng: np.random.Generator, wall: Surface, length: float) -> Iterator[Surface]:
    """Up to two things on a wall of `length` metres, a millimetre before it."""
    met = np.isfinite(wall.distance)
    _, uv = wall.at(met)
    for name in rng.choice(list(DECALS), size=rng.integers(0, 3), replace=False):
        width, height, bottom = (rng.uniform(*bounds) for bounds in DECALS[name])
        left = rng.uniform(0, max(length - width, 0.01))
        u, v = uv[:, 0] - left, uv[:, 1] - bottom
        inside = np.zeros_like(met)
        inside[met] = (u >= 0) & (u <= width) & (v >= 0) & (v <= height)
        distance = np.where(inside, wall.distance - np.float32(1e-3), np.float32(np.inf))
        yield Surface(distance, wall.at, CLASS[name], Texture.random(rng))


def _furniture(
    rng: np.random.Generator, room: np.ndarray, eye: np.ndarray, rays: np.ndarray
) -> Iterator[Surface]:
    for _ in range(rng.integers(2, 7)):
        name = rng.choice(list(FURNITURE))
        size = np.array([rng.uniform(*bounds) for bounds in FURNITURE[name]])
        reach = np.hypot(*size[:2]) / 2
        centre = rng.uniform(reach, np.maximum(room[:2] - reach, reach + 0.01))
        if np.linalg.norm(centre - eye[:2]) < reach + 0.45:
            continue  # the camera would stand in it
        turn = rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.15)
        texture = Texture.random(rng)
        for low, high in _parts(name, size):
            yield Surface(*_box(low, high, centre, turn, eye, rays), CLASS[name], texture)


def _parts(name: str, size: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the boxes (low corner, high corner) of a piece of furniture, about its centre."""
    w, d, h = size
    half = np.array([w / 2, d / 2])

    def box(
        x0: float, y0: float, z0: float, x1: float, y1: float, z1: float
    ) -> tuple[np.ndarray, np.ndarray]:
        return np.array([x0 * half[0], y0 * half[1], z0 * h]), np.array(
            [x1 * half[0], y1 * half[1], z1 * h]
        )

    legs = [box(x, y, 0, x + 0.14, y + 0.14, 0.92) for x in (-1, 0.86) for y in (-1, 0.86)]
    if name == "table":
        return [box(-1, -1, 0.92, 1, 1, 1), *legs]
    if name == "chair":
        seat, back = box(-1, -1, 0.45, 1, 1, 0.52), box(-1, 0.8, 0.5, 1, 1, 1)
        return [seat, back, box(-0.8, -0.8, 0, 0.8, 0.8, 0.1), box(-0.1, -0.1, 0, 0.1, 0.1, 0.5)]
    if name == "sofa":
        return [
            box(-1, -1, 0, 1, 1, 0.5),
            box(-1, 0.6, 0, 1, 1, 1),
            box(-1, -1, 0, -0.8, 1, 0.75),
            box(0.8, -1, 0, 1, 1, 0.75),
        ]
    return [box(-1, -1, 0, 1, 1, 1)]


def _box(
    low: np.ndarray,
    high: np.ndarray,
    centre: np.ndarray,
    turn: float,
    eye: np.ndarray,
    rays: np.ndarray,
) -> tuple[np.ndarray, Any]:
    """The slab test in the box's own frame, `turn` radians about the vertical through `centre`."""
    cos, sin = np.cos(turn), np.sin(turn)
    rotation = np.array(
        [[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]], dtype=np.float32
    )  # room -> box
    origin = rotation @ (eye - np.array([*centre, 0.0], dtype=np.float32))
    directions = (
        rays @ rotation.T
    ).T  # (3,P): one coordinate after the other is several times faster here
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / directions
        to_low = (low - origin).astype(np.float32)[:, None] * inverse
        to_high = (high - origin).astype(np.float32)[:, None] * inverse
    near, far = np.minimum(to_low, to_high), np.maximum(to_low, to_high)
    enter, leave = near.max(axis=0), far.min(axis=0)
    distance = np.where((enter <= leave) & (enter > 0), enter, np.float32(np.inf))

    def at(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        axis = near[:, seen].argmax(axis=0)
        rows = np.arange(len(axis))
        normal = np.zeros((len(axis), 3), dtype=np.float32)
        normal[rows, axis] = -np.sign(directions[:, seen][axis, rows])
        point = origin + (enter[seen] * directions[:, seen]).T
        return normal @ rotation, np.stack(
            [point[rows, (axis + 1) % 3], point[rows, (axis + 2) % 3]], axis=1
        )

    return distance, at


def _balls(
    rng: np.random.Generator, room: np.ndarray, eye: np.ndarray, rays: np.ndarray, lamp: np.ndarray
) -> Iterator[Surface]:
    """Balls on the floor, and the lamp."""
    yield Surface(
        *_sphere(lamp, rng.uniform(0.08, 0.2), eye, rays),
        CLASS["lamp"],
        Texture.plain(np.array([1.0, 0.95, 0.8])),
    )
    for _ in range(rng.integers(0, 4)):
        radius = rng.uniform(0.1, 0.35)
        centre = np.array([*rng.uniform(radius, room[:2] - radius), radius], dtype=np.float32)
        if np.linalg.norm(centre - eye) > radius + 0.5:
            yield Surface(*_sphere(centre, radius, eye, rays), CLASS["ball"], Texture.random(rng))


def _sphere(
    centre: np.ndarray, radius: float, eye: np.ndarray, rays: np.ndarray
) -> tuple[np.ndarray, Any]:
    towards = centre - eye
    along = rays @ towards
    under_root = along**2 - towards @ towards + np.float32(radius) ** 2
    near = along - np.sqrt(np.maximum(under_root, 0))
    distance = np.where((under_root > 0) & (near > 0), near, np.float32(np.inf))

    def at(seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        normal = (eye + distance[seen, None] * rays[seen] - centre) / radius
        angles = np.arctan2(normal[:, 1], normal[:, 0]), np.arccos(np.clip(normal[:, 2], -1, 1))
        return normal, np.stack(angles, axis=1) * radius

    return distance, at


def _shade(
    rng: np.random.Generator,
    point: np.ndarray,
    normal: np.ndarray,
    colour: np.ndarray,
    lamp: np.ndarray,
    shines: np.ndarray,
) -> np.ndarray:
    """Shade by Lambert's law with a lamp, ambient light, exposure and noise; uint8 (P, 3)."""
    towards = lamp - point
    distance = np.linalg.norm(towards, axis=1)
    lambert = np.abs((normal * towards).sum(axis=1)) / np.maximum(distance, 1e-6)
    ambient, power = rng.uniform(0.25, 0.45), rng.uniform(1.2, 2.2)
    light = np.float32(ambient) + np.float32(power) * lambert / (1 + np.float32(0.35) * distance**2)
    balance = (rng.uniform(0.85, 1.1, 3) * rng.uniform(0.75, 1.15)).astype(np.float32)
    linear = np.where(shines[:, None], 1.0, colour * light[:, None] * balance)
    noisy = linear + 0.012 * rng.standard_normal(linear.shape, dtype=np.float32)
    return (np.clip(noisy, 0, 1) ** (1 / 1.6) * 255).round().astype(np.uint8)


def rooms_file(
    folder: str | Path | None = None,
    num_frames: int = 1000,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
) -> Path:
    """Write the rooms as a file in the layout of nyu_depth_v2_labeled.mat, on first use.

    The first 80 % of the frames are for training. Frame i depends only on (seed, i), so no room is
    in both splits.

    Args:
        folder: Where the file is kept. Default: METAVPT_CACHE, else ~/.cache/metavpt.
        num_frames: The number of frames.
        size: (H, W).
        seed: The seed.
    """
    folder = cache_folder(folder)
    height, width = (int(side) for side in size)
    if num_frames < 2 or min(height, width) < 1:
        raise MetaVPTError(
            f"data.rooms: num_frames={num_frames} must be 2 or more, and size={height}x{width} "
            "positive"
        )
    path = folder / f"rooms-{num_frames}-{height}x{width}-seed{seed}.mat"
    if path.exists():
        return path
    partial = path.with_suffix(
        f".{os.getpid()}.partial"
    )  # of this process: two runs may make the same file at once
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_rooms(partial, num_frames, (height, width), seed)
        os.replace(partial, path)
    except OSError as error:
        raise MetaVPTError(
            f"{folder}: generated rooms cannot be written ({error}); set data.rooms.folder or "
            "METAVPT_CACHE"
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink()
    return path


def _write_rooms(path: Path, num_frames: int, size: tuple[int, int], seed: int) -> None:
    height, width = size
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (num_frames, 3, width, height), "uint8")
        depths = file.create_dataset("depths", (num_frames, width, height), "float32")
        labels = file.create_dataset("labels", (num_frames, width, height), "uint16")
        for i in track(
            range(num_frames), description=f"generating {num_frames} rooms (once)", transient=True
        ):
            image, depth, label = generate_room(np.random.default_rng([seed, i]), size)
            images[i], depths[i], labels[i] = image.transpose(2, 1, 0), depth.T, label.T
        references = file.create_dataset("names", (1, len(CLASS_NAMES)), h5py.ref_dtype)
        for i, name in enumerate(CLASS_NAMES):
            references[0, i] = file.create_dataset(
                f"#refs#/{i}", data=np.array([[ord(letter)] for letter in name], dtype="uint16")
            ).ref
        num_train = min(round(TRAIN_SHARE * num_frames), num_frames - 1)
        file["trainNdxs"] = np.arange(1, num_train + 1, dtype="float64")[None]
        file["testNdxs"] = np.arange(num_train + 1, num_frames + 1, dtype="float64")[None]
