from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metavpt.data.dense import ade20k_data, nyuv2_data
from metavpt.data.loader import FrameLoader, JointLoader
from metavpt.errors import MetaVPTError

SIZE = (16, 24)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return {"folder": str(tmp_path_factory.mktemp("rooms")), "num_frames": 20, "size": [12, 16]}


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four training pairs and two for validation."""
    folder = tmp_path_factory.mktemp("ADEChallengeData2016")
    rng = np.random.default_rng(0)
    for split, count in (("training", 4), ("validation", 2)):
        for kind, suffix, shape in (
            ("images", "jpg", (20, 30, 3)),
            ("annotations", "png", (20, 30)),
        ):
            (folder / kind / split).mkdir(parents=True)
            for i in range(count):
                array = rng.integers(
                    0, 151 if kind == "annotations" else 256, shape, dtype=np.uint8
                )
                Image.fromarray(array).save(folder / kind / split / f"{i}.{suffix}")
    return str(folder)


def test_pools_are_disjoint_and_the_same_for_a_seed(rooms: dict):
    data, again, other = (
        nyuv2_data(rooms=rooms, num_train=8, num_meta=4, seed=seed) for seed in (0, 0, 1)
    )
    pools = [set(pool) for pool in (data.train, data.meta, data.held_out, data.val)]
    assert [len(pool) for pool in pools] == [8, 4, 4, 4]
    assert len(set().union(*pools)) == 20
    assert (data.train, data.meta) == (again.train, again.meta) != (other.train, other.meta)
    half = nyuv2_data(rooms=rooms, num_train=8, num_meta=4, share=0.5)
    assert set(half.heads) < set(data.heads) == set(half.train)
    assert len(half.meta) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_train": 14, "num_meta": 3},
            r"data\.num_train=14 and data\.num_meta=3 .* the 16 train frames",
        ),
        ({"num_train": 0, "num_meta": 3}, r"data\.num_train=0"),
        ({"num_train": 4, "num_meta": 3, "share": 0.0}, r"data\.share=0\.0"),
        ({"num_train": 4, "num_meta": 3, "unlabelled": []}, r"data\.unlabelled is empty"),
    ],
)
def test_bad_pools_are_named(rooms: dict, options: dict, message: str):
    with pytest.raises(MetaVPTError, match=message):
        nyuv2_data(rooms=rooms, **options)


def test_ade20k(ade20k: str):
    data = ade20k_data(ade20k, SIZE, "stretch", num_train=2, num_meta=1)
    assert [task.name for task in data.tasks] == ["segmentation"]
    assert (data.frames.size, data.frames.num_classes, len(data.val), data.stream_size) == (
        SIZE,
        150,
        2,
        SIZE,
    )
    assert data.unlabelled[0].shape == (3, *SIZE)
    batch = next(iter(FrameLoader(data.frames, data.train, 2, seed=0)))
    assert (batch.depth.shape, batch.label.shape) == ((2, *SIZE), (2, *SIZE))


@pytest.mark.parametrize(("make", "name"), [(nyuv2_data, "NYUv2"), (ade20k_data, "ADE20K")])
def test_rooms_stand_in_visibly(rooms: dict, make, name: str, capsys: pytest.CaptureFixture[str]):
    data = make(rooms=rooms, num_train=8, num_meta=4)
    told = capsys.readouterr().err
    assert "generated rooms" in told
    assert name in told
    expected = ["depth", "segmentation"] if name == "NYUv2" else ["segmentation"]
    assert [task.name for task in data.tasks] == expected
    assert data.frames.num_classes == 13


def test_labelled_frames_are_decoded_once(rooms: dict):
    data = nyuv2_data(rooms=rooms, num_train=8, num_meta=4)
    loader = FrameLoader(data.frames, data.train, 8, seed=0)
    first = next(iter(loader))
    data.frames.frames = None  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(next(iter(loader)), first, strict=True))


def test_a_joint_batch_has_one_of_each_set_and_skips_exactly(rooms: dict, ade20k: str):
    sets = {
        "a": nyuv2_data(rooms=rooms, num_train=8, num_meta=4),
        "b": ade20k_data(ade20k, SIZE, num_train=2, num_meta=1),
    }

    def joint() -> JointLoader:
        return JointLoader(
            {name: FrameLoader(data.frames, data.train, 2, seed=3) for name, data in sets.items()}
        )

    batches = list(islice(joint(), 5))
    assert all(
        batch["a"].image.shape == (2, 3, 12, 16) and batch["b"].image.shape == (2, 3, *SIZE)
        for batch in batches
    )
    resumed = joint()
    resumed.skip(4)
    for name, frames in next(iter(resumed)).items():
        assert torch.equal(frames.image, batches[4][name].image)
        alone = FrameLoader(sets[name].frames, sets[name].train, 2, seed=3)
        assert torch.equal(frames.image, next(islice(alone, 4, None)).image)


def test_the_folder_of_the_images_can_be_streamed_beside_the_frames(ade20k: str):
    extra = str(Path(ade20k) / "images" / "validation")
    data = ade20k_data(
        ade20k, SIZE, num_train=2, num_meta=1, unlabelled=["frames", extra], stream_size=[8, 8]
    )
    assert len(data.unlabelled) == 4 + 2  # type: ignore[arg-type]
    assert data.unlabelled[5].shape == (3, 8, 8)
