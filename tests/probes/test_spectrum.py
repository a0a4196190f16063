"""Effective rank and kernel alignment against closed forms and the definitions written out."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.errors import MetaVPTError
from metavpt.learners.vit import Features
from metavpt.probes.spectrum import Spectrum, linear_cka, rankme

N, D = 30, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rankme_of_known_spectra() -> None:
    q, _ = torch.linalg.qr(draw(N, D))
    assert rankme(7 * q) == pytest.approx(D, rel=1e-4)  # all alike; 1e-7 is added to each share
    assert rankme(draw(N, 1) @ draw(1, D, seed=1)) == pytest.approx(1, rel=1e-4)
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    entropy = sum(-p * math.log(p) for p in (0.5, 0.25, 0.125, 0.125))
    assert rankme(q * sigma) == pytest.approx(math.exp(entropy), rel=1e-4)


def test_rankme_is_not_centred() -> None:
    """As in its paper: features that are a constant and little else have collapsed."""
    assert rankme(1000 + draw(N, D)) < 1.1 < rankme(draw(N, D))


def naive_cka(x: Tensor, y: Tensor) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with linear kernels, as defined."""
    h = torch.eye(N, dtype=torch.float64) - 1 / N
    k, kl = x @ x.T, y @ y.T

    def hsic(a: Tensor, b: Tensor) -> float:
        return float(torch.trace(a @ h @ b @ h))

    return hsic(k, kl) / math.sqrt(hsic(k, k) * hsic(kl, kl))


def test_cka_is_its_definition_and_forgets_rotation_scale_and_shift() -> None:
    x, y = draw(N, D), draw(N, 4, seed=1)
    assert linear_cka(x, y) == pytest.approx(naive_cka(x, y), abs=1e-12)
    assert 0 < linear_cka(x, y) < 0.7
    rotation, _ = torch.linalg.qr(draw(D, D, seed=2))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-12)
    assert math.isnan(linear_cka(x, torch.ones(N, D)))


class Images(Dataset[Tensor]):
    """Image k is filled with k."""

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        self.seen.append(index)
        return torch.full((3, 2, 2), index, dtype=torch.uint8)


class Table:
    """Features of image k are row k of a table."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, images: Tensor) -> Features:
        rows = self.table[images[:, 0, 0, 0].long()].float()
        return Features(rows, rows[:, :, None, None].expand(-1, -1, 2, 2))


def test_similarity_is_to_the_first_measurement_also_after_a_resume() -> None:
    before, after = Table(draw(N, D)), Table(draw(N, D) + 0.5 * draw(N, D, seed=1))
    spectrum = Spectrum(num_images=N)
    first = spectrum(before, Images(N))
    assert first["cka/step0"] == pytest.approx(1, abs=1e-9)
    assert first["rank/rankme"] == pytest.approx(rankme(before.table), rel=1e-5)
    moved = spectrum(after, Images(N))["cka/step0"]
    assert moved == pytest.approx(naive_cka(before.table, after.table), abs=1e-5)
    resumed = Spectrum(num_images=N)
    resumed.load_state_dict(spectrum.state_dict())
    assert resumed(after, Images(N))["cka/step0"] == moved


def test_images_are_spread_over_the_stream() -> None:
    images = Images(N)
    Spectrum(num_images=10, batch_size=4)(Table(draw(N, D)), images)
    assert images.seen == list(range(0, N, 3))
    few = Images(5)
    Spectrum(num_images=10)(Table(draw(N, D)), few)
    assert few.seen == list(range(5))


def test_bad_settings_are_named() -> None:
    with pytest.raises(MetaVPTError, match="num_images=1"):
        Spectrum(num_images=1)
    with pytest.raises(MetaVPTError, match="pool='sum'"):
        Spectrum(pool="sum")  # type: ignore[arg-type]
