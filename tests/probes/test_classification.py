"""The classification probe on images whose colour is their class, and heads with known answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metavpt.errors import MetaVPTError, NonFiniteError
from metavpt.learners.vit import Features
from metavpt.probes.classification import ClassificationProbe, ClassTask
from metavpt.probes.features import FeatureSet
from metavpt.probes.heads import LinearBN, Ridge
from metavpt.probes.knn import KNN

NO_IMAGES: Any = ()
HEADS = {"knn": KNN(3), "ridge": Ridge(), "linear_bn": LinearBN(num_steps=60, batch_size=16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 training and 30 validation images of three colours, with a tenth of the labels wrong."""
    rng = np.random.default_rng(0)
    label = np.arange(90) % 3
    images = rng.integers(0, 120, (90, 16, 16, 3), dtype=np.uint8)
    images[np.arange(90), :, :, label] += 100
    told = np.where(np.arange(90) % 10 == 9, (label + 1) % 3, label)
    np.savez(
        tmp_path / "a.npz", images=images, label=told, split=(np.arange(90) >= 60).astype(np.uint8)
    )
    return tmp_path


class Colours:
    """The mean colour of each quarter; cls is the first one's. Counts the images that it sees."""

    num_images = 0

    def __call__(self, images: torch.Tensor) -> Features:
        assert not torch.is_grad_enabled()
        self.num_images += len(images)
        patches = torch.nn.functional.avg_pool2d(images.float() / 255, 8)
        return Features(patches[:, :, 0, 0], patches)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_every_head_on_one_pass_over_the_images(folder: Path, pool) -> None:
    probe, colours = ClassificationProbe(str(folder), (16, 16), HEADS, pool=pool), Colours()
    metrics = probe(colours, NO_IMAGES)
    assert metrics == dict.fromkeys(
        ("knn/accuracy", "ridge/accuracy", "linear_bn/accuracy"), 0.9
    )  # all but the lies
    assert colours.num_images == 90
    state = torch.get_rng_state()
    assert probe(colours, NO_IMAGES) == metrics
    assert torch.equal(state, torch.get_rng_state())


def test_ridge_to_one_hot_is_the_dense_solve() -> None:
    generator = torch.Generator().manual_seed(0)
    x, label = (
        torch.randn(30, 4, generator=generator),
        torch.randint(0, 300, (30, 1, 1), generator=generator),
    )  # more than a byte holds
    frames = FeatureSet(x[:, :, None, None], label)
    scores = Ridge(penalty=0.1).fit(ClassTask(300), frames)(frames.features)[:, :, 0, 0].double()
    z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    y = torch.nn.functional.one_hot(label.flatten(), 300).double()
    weight = torch.linalg.solve(
        z.T @ z + 0.1 * 30 * torch.eye(4, dtype=torch.float64), z.T @ (y - y.mean(0))
    )
    torch.testing.assert_close(
        scores, z @ weight + y.mean(0), atol=1e-6, rtol=0
    )  # heads are applied in float32


def test_fewer_images_are_drawn_by_the_seed(folder: Path) -> None:
    colours = Colours()
    probes = [
        ClassificationProbe(
            str(folder), (16, 16), {"knn": KNN(3)}, num_train=20, num_val=10, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert probes[0].train.indices == probes[1].train.indices != probes[2].train.indices
    probes[0](colours, NO_IMAGES)
    assert colours.num_images == 30
    part = probes[0].train
    whole = ClassificationProbe(str(folder), (16, 16)).train
    assert part.labels.tolist() == [int(whole.labels[i]) for i in part.indices]


def test_images_are_decoded_once(folder: Path) -> None:
    probe = ClassificationProbe(str(folder), (16, 16), {"knn": KNN(3)})
    probe(Colours(), NO_IMAGES)
    probe.train.images.images = probe.val.images.images = None  # type: ignore[assignment]
    assert probe(Colours(), NO_IMAGES)["knn/accuracy"] == 0.9


def test_bad_settings_and_features_are_named(folder: Path) -> None:
    with pytest.raises(MetaVPTError, match="pool='max'"):
        ClassificationProbe(str(folder), pool="max")  # type: ignore[arg-type]
    with pytest.raises(MetaVPTError, match="num_train"):
        ClassificationProbe(str(folder), num_train=0)
    with pytest.raises(NonFiniteError):
        ClassificationProbe(str(folder), (16, 16))(
            lambda images: Features(images.sum((2, 3)), images.float() / 0), NO_IMAGES
        )


@pytest.mark.shared_data
def test_colours_tell_more_than_chance_on_tiny_imagenet(shared_data: Path) -> None:
    """A 4 x 4 thumbnail as the feature of an image: 200 classes, chance 0.5 %."""

    def thumbnail(images: torch.Tensor) -> Features:
        flat = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255 - 0.45, 4).flatten(1)
        return Features(flat, flat[:, :, None, None])

    heads = {"knn": KNN(), "ridge": Ridge()}
    metrics = ClassificationProbe(
        str(shared_data / "tiny_imagenet"), (64, 64), heads, num_train=2000, num_val=500
    )(thumbnail, NO_IMAGES)
    assert all(0.015 < value < 0.15 for value in metrics.values())
