import pytest
import torch

from metavpt.designers.crop import RandomCrop, random_crop
from metavpt.errors import MetaVPTError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_a_normalised_random_crop_and_nothing_else() -> None:
    images = torch.randint(0, 256, (3, 3, 20, 30), dtype=torch.uint8)
    crops = RandomCrop(MEAN, STD, size=16, scale=(0.3, 0.9), flip=0.5)(images, seed=5)
    expected = random_crop(images / 255, 16, (0.3, 0.9), 0.5, torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        crops * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1),
        expected,
        atol=1e-6,
        rtol=0,
    )
    assert RandomCrop(MEAN, STD, size=16)((images / 255).double(), seed=5).dtype == torch.float64


def test_seeds_decide_and_the_global_state_stays() -> None:
    images, crop = torch.rand(4, 3, 20, 30), RandomCrop(MEAN, STD, size=8)
    state = torch.get_rng_state()
    first = crop(images, 1)
    assert first.shape == (4, 3, 8, 8)
    assert torch.equal(first, crop(images, 1))
    assert not torch.equal(first, crop(images, 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_mirrors() -> None:
    images = torch.rand(2, 3, 16, 16)
    plain, mirrored = (RandomCrop(MEAN, STD, size=8, flip=flip)(images, 0) for flip in (0.0, 1.0))
    torch.testing.assert_close(mirrored.flip(-1), plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"scale": (0.0, 1.0)}, {"scale": (0.5, 0.4)}, {"flip": 1.5}]
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(MetaVPTError, match="RandomCrop: needs"):
        RandomCrop(MEAN, STD, **options)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 8, 8), torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.int64)],
)
def test_other_images_are_refused(images) -> None:
    with pytest.raises(MetaVPTError, match="RandomCrop: images must be"):
        RandomCrop(MEAN, STD, size=8)(images, 0)
