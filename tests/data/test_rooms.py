from pathlib import Path

import numpy as np
import pytest

from metavpt.data import rooms
from metavpt.data.nyuv2 import NYUv2Mat
from metavpt.data.rooms import CLASS, CLASS_NAMES, PATTERNS, Texture, generate_room, rooms_file
from metavpt.errors import MetaVPTError

SIZE = (24, 32)


def room(i: int, size: tuple[int, int] = SIZE, seed: int = 0):
    return generate_room(np.random.default_rng([seed, i]), size)


def camera(i: int, size: tuple[int, int] = SIZE):
    """Draw again what `generate_room` draws first: room (3,), eye (3,), rays (P, 3), axis (3,)."""
    rng = np.random.default_rng([0, i])
    extent = rng.uniform((3.0, 3.5, 2.3), (6.5, 8.0, 3.0))
    eye = np.array(
        [
            rng.uniform(0.25, 0.75) * extent[0],
            rng.uniform(0.08, 0.3) * extent[1],
            rng.uniform(1.1, 1.7),
        ]
    )
    rays, axis = rooms._camera_rays(rng, size)
    return extent, eye, rays.astype(float), axis.astype(float)


def test_depth_is_metric_along_the_optical_axis():
    """Pixels projected back by their depth lie on the floor, the ceiling or a wall."""
    for i in range(20):
        extent, eye, rays, axis = camera(i)
        _, depth, label = room(i)
        points = eye + (depth.ravel() / (rays @ axis))[:, None] * rays
        classes = label.ravel() - 1
        free = depth.ravel() > rooms.MIN_DEPTH  # nearer things are clipped
        assert np.abs(points[(classes == CLASS["floor"]) & free, 2]).max(initial=0) < 1e-4
        assert (
            np.abs(points[(classes == CLASS["ceiling"]) & free, 2] - extent[2]).max(initial=0)
            < 1e-4
        )
        to_walls = np.minimum(np.abs(points[:, :2]), np.abs(points[:, :2] - extent[:2])).min(axis=1)
        assert to_walls[(classes == CLASS["wall"]) & free].max(initial=0) < 1e-4
        hung = np.isin(classes, [CLASS[name] for name in ("picture", "window", "door")]) & free
        assert to_walls[hung].max(initial=0) < 2e-3
        assert ((points > -1e-3) & (points < extent + 1e-3)).all()


def first_inside(inside, eye: np.ndarray, ray: np.ndarray, reach: float = 8.0) -> float:
    """The distance at which a marched ray enters a solid, to 1e-6; infinite for a miss."""
    steps = np.linspace(0, reach, 4001)
    hits = np.flatnonzero(inside(eye + steps[:, None] * ray))
    if len(hits) == 0:
        return np.inf
    low, high = steps[hits[0] - 1], steps[hits[0]]
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (low, middle) if inside((eye + middle * ray)[None])[0] else (middle, high)
    return float(high)


def test_boxes_and_balls_against_marched_rays():
    rng = np.random.default_rng(1)
    eye = np.array([0.1, -3.0, 1.2])
    rays = np.array([0.0, 1.0, -0.2]) + rng.uniform(-0.25, 0.25, (60, 3))
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    low, high, centre, turn = (
        np.array([-0.7, -0.4, 0.1]),
        np.array([0.7, 0.4, 0.8]),
        np.array([0.2, 0.3]),
        0.4,
    )
    ball, radius = np.array([-0.3, 0.1, 0.5]), 0.45

    def in_box(points: np.ndarray) -> np.ndarray:
        x, y = (points[:, :2] - centre).T
        turned = np.stack(
            [
                np.cos(turn) * x + np.sin(turn) * y,
                -np.sin(turn) * x + np.cos(turn) * y,
                points[:, 2],
            ],
            axis=1,
        )
        return np.asarray(((turned >= low) & (turned <= high)).all(axis=1))

    def in_ball(points: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.norm(points - ball, axis=1) <= radius)

    arguments = eye.astype(np.float32), rays.astype(np.float32)
    for (distance, at), inside in (
        (rooms._box(low, high, centre, turn, *arguments), in_box),
        (rooms._sphere(ball.astype(np.float32), radius, *arguments), in_ball),
    ):
        expected = np.array([first_inside(inside, eye, ray) for ray in rays])
        assert 10 < np.isfinite(expected).sum() < 60
        np.testing.assert_allclose(distance, expected, rtol=1e-4)
        seen = np.isfinite(distance)
        normal, _ = at(seen)
        np.testing.assert_allclose(np.linalg.norm(normal, axis=1), 1, atol=1e-4)
        assert ((normal * rays[seen]).sum(axis=1) < 0).all()


def test_a_sphere_around_or_behind_the_camera_is_not_seen():
    rays = np.array([[0, 1, 0], [1, 0, 0]], np.float32)
    for centre in ([0, 0.1, 0], [-1, -1, 0]):
        distance, _ = rooms._sphere(
            np.array(centre, np.float32), 0.3, np.zeros(3, np.float32), rays
        )
        assert np.isinf(distance).all()


def test_frames_are_diverse_and_in_range():
    frames = [room(i) for i in range(120)]
    images, depths, labels = (np.stack(arrays) for arrays in zip(*frames, strict=True))
    assert images.dtype == np.uint8
    assert depths.dtype == np.float32
    assert depths.min() >= rooms.MIN_DEPTH
    assert depths.max() <= rooms.MAX_DEPTH
    assert set(np.unique(labels)) == set(range(1, len(CLASS_NAMES) + 1))
    assert depths.std(axis=0).min() > 0.5  # no pixel whose depth the layout of rooms gives away
    assert images.mean(axis=(1, 2)).std(axis=0).min() > 20  # colour differs between rooms


def test_colour_does_not_give_the_class():
    """Mean colours of a class in each frame spread far wider than the classes lie apart."""
    means = {name: [] for name in ("wall", "floor", "bed", "cabinet")}
    for i in range(80):
        image, _, label = room(i)
        for name, colours in means.items():
            seen = label == CLASS[name] + 1
            if seen.sum() > 10:
                colours.append(image[seen].mean(axis=0))
    centres = np.array([np.mean(colours, axis=0) for colours in means.values()])
    spread = np.mean([np.std(colours, axis=0) for colours in means.values()])
    assert spread > 1.5 * centres.std(axis=0).max()


def test_file_equals_generated_frames_and_is_reused(tmp_path: Path):
    path = rooms_file(tmp_path, num_frames=10, size=SIZE, seed=3)
    assert path.name == "rooms-10-24x32-seed3.mat"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    frames = NYUv2Mat(path)
    assert frames.class_names == CLASS_NAMES
    assert frames.splits == {"train": list(range(8)), "val": [8, 9]}
    for i in range(10):
        image, depth, label = room(i, seed=3)
        frame = frames[i]
        assert (frame.image.permute(1, 2, 0).numpy() == image).all()
        assert (frame.depth.numpy() == depth).all()
        assert (frame.label.numpy() == label.astype(int) - 1).all()
    written = path.stat().st_mtime_ns
    assert rooms_file(tmp_path, num_frames=10, size=SIZE, seed=3).stat().st_mtime_ns == written


def test_same_seed_same_bytes(tmp_path: Path):
    paths = [
        rooms_file(tmp_path / name, 4, SIZE, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = (
        b"".join(
            frame.image.numpy().tobytes() for frame in map(NYUv2Mat(path).__getitem__, range(4))
        )
        for path in paths
    )
    assert first == again != other
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "cache"))
    assert rooms_file(num_frames=2, size=SIZE).parent == tmp_path / "cache"


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rooms, "generate_room", interrupt)
    with pytest.raises(KeyboardInterrupt):
        rooms_file(tmp_path, 4, SIZE)
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_named(tmp_path: Path):
    with pytest.raises(MetaVPTError, match="num_frames=1"):
        rooms_file(tmp_path, 1, SIZE)
    (tmp_path / "file").write_text("")
    with pytest.raises(MetaVPTError, match="METAVPT_CACHE"):
        rooms_file(tmp_path / "file", 2, SIZE)


@pytest.mark.parametrize("kind", PATTERNS)
def test_texture_mixes_its_two_colours(kind: str) -> None:
    colours = np.array([[0.0, 0.2, 1.0], [1.0, 0.4, 0.0]], dtype=np.float32)
    phases = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    uv = np.random.default_rng(1).uniform(-3, 3, (500, 2)).astype(np.float32)
    found = Texture(kind, colours, 0.3, 0.7, phases)(uv)
    assert found.shape == (500, 3)
    mix = found[:, 0]
    assert ((mix >= -1e-6) & (mix <= 1 + 1e-6)).all()
    np.testing.assert_allclose(found[:, 1], 0.2 + 0.2 * mix, atol=1e-5)
    np.testing.assert_allclose(found[:, 2], 1 - mix, atol=1e-5)
    assert np.ptp(mix) > 0.05


def test_plain_texture_has_one_colour() -> None:
    colour = np.array([0.1, 0.5, 0.9])
    found = Texture.plain(colour)(np.random.default_rng(0).normal(size=(20, 2)))
    np.testing.assert_allclose(found, np.tile(colour, (20, 1)), atol=1e-6)


def test_random_texture_is_set_by_its_generator() -> None:
    first, again, other = (Texture.random(np.random.default_rng(seed)) for seed in (3, 3, 4))
    uv = np.random.default_rng(0).normal(size=(20, 2))
    np.testing.assert_array_equal(first(uv), again(uv))
    assert not np.array_equal(first(uv), other(uv))
