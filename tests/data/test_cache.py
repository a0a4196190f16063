import copy
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from metavpt.data.cache import Cache, CachedFrames, CachedImages
from metavpt.data.frames import Frame, RGBDFrames
from metavpt.data.loader import FrameLoader


class Counted(RGBDFrames):
    """Five frames of 2 x 3; counts what is decoded."""

    name, size, class_names, splits = (
        "counted",
        (2, 3),
        ["a", "b"],
        {"train": [0, 1, 2], "val": [3, 4]},
    )

    def __init__(self) -> None:
        self.num_decoded = self.num_images = 0

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Frame:
        self.num_decoded += 1
        return Frame(
            torch.full((3, 2, 3), index, dtype=torch.uint8),
            torch.full((2, 3), index / 7),
            torch.tensor([[0, 1, 255]] * 2),
        )

    def image(self, index: int) -> Tensor:
        self.num_images += 1
        return torch.full((3, 2, 3), index, dtype=torch.uint8)


FRAME_BYTES = 3 * 2 * 3 + 4 * 2 * 3 + 2 * 3  # the label takes one byte a pixel


class Flow(NamedTuple):
    image: Tensor
    flow: Tensor
    occluded: Tensor


class FlowFrames(Counted):
    """Frames with labels of their own: a field of vectors, and classes of pixels."""

    class_names = ()

    def __getitem__(self, index: int) -> Any:
        image, depth, label = super().__getitem__(index)
        return Flow(image, torch.stack([depth, -depth]), label)


def test_frames_may_have_labels_of_their_own():
    frames = CachedFrames(FlowFrames(), 10**6)
    (batch,) = FrameLoader.in_order(frames, [3, 1], 2)
    assert isinstance(batch, Flow)
    for field, (third, first) in zip(batch, zip(frames[3], frames[1], strict=True), strict=True):
        assert torch.equal(field, torch.stack([third, first]))
    assert batch.flow.shape == (2, 2, 2, 3)
    assert (batch.image.dtype, batch.occluded.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize(
    ("max_bytes", "num_kept"),
    [(0, 0), (FRAME_BYTES - 1, 0), (FRAME_BYTES, 1), (3 * FRAME_BYTES + 5, 3), (10**6, 5)],
)
def test_what_fits_is_decoded_once_and_the_rest_each_time(max_bytes: int, num_kept: int):
    frames = Counted()
    cached = CachedFrames(frames, max_bytes)
    for _ in range(3):
        for i in range(5):
            for field, expected in zip(cached[i], Counted()[i], strict=True):
                assert field.dtype == expected.dtype
                assert torch.equal(field, expected)
    assert frames.num_decoded == 5 * 3 - 2 * num_kept
    assert (len(cached), cached.size, cached.splits, cached.num_classes) == (
        5,
        (2, 3),
        frames.splits,
        2,
    )


def test_an_image_comes_from_a_frame_that_is_kept():
    frames = Counted()
    cached = CachedFrames(frames, 10**6)
    assert torch.equal(cached.image(3), frames.image(3))
    assert (frames.num_decoded, frames.num_images) == (0, 2)
    cached[3]
    assert torch.equal(cached.image(3), cached[3].image)
    assert (frames.num_decoded, frames.num_images) == (1, 2)


def test_copies_begin_with_an_empty_cache():
    cache = Cache(torch.tensor, 1000)
    cache(3)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert 3 in cache
        assert 3 not in other
        other(3)
        assert 3 in other


def test_a_view_is_charged_for_all_that_it_holds_on_to():
    cache = Cache(lambda index: torch.zeros(1000, dtype=torch.uint8)[:1], 1999)
    assert [i in cache for i in range(2) if cache(i) is not None] == [True, False]


def test_images():
    class Images(Dataset[Tensor]):
        num_decoded = 0

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> Tensor:
            self.num_decoded += 1
            return torch.full((3, 2, 2), index, dtype=torch.uint8)

    images = Images()
    cached = CachedImages(images, 12)
    assert [int(cached[i][0, 0, 0]) for i in (0, 1, 0, 1)] == [0, 1, 0, 1]
    assert (images.num_decoded, len(cached)) == (3, 2)
