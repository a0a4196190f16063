import numpy as np
import pytest

from metavpt.data.textures import KINDS, Texture


@pytest.mark.parametrize("kind", KINDS)
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
