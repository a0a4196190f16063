"""The data of a dense vision problem: labelled frames in pools, and an unlabelled stream."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from metavpt.cli.console import say
from metavpt.data.ade20k import ADE20K
from metavpt.data.cache import CachedFrames
from metavpt.data.frames import RGBDFrames
from metavpt.data.images import FrameImages, open_images
from metavpt.data.labelled import Classes, LabelledImages, Places
from metavpt.data.nyuv2 import open_nyuv2
from metavpt.data.overlap import overlap
from metavpt.data.photo import Resize
from metavpt.dense_tasks.depth import MAX_DEPTH, DepthTask
from metavpt.dense_tasks.segmentation import SegmentationTask
from metavpt.dense_tasks.task import DenseTask
from metavpt.errors import MetaVPTError

FRAMES = "frames"  # the name, in `unlabelled`, of the images of the labelled train frames


class DenseData:
    """A labelled set: its tasks, its pools, which are disjoint, and the unlabelled images.

    The pools are drawn by `seed` and are the same for every run with it. `labelled` is what
    feedback has: `heads`, which feedback heads are fitted on, and `meta`, which g_down is taken on.
    `train` is what the probes' heads are fitted on. `held_out` are train frames of neither pool
    (where there are none left, the meta frames again): what designer updates do to other frames is
    measured on them. `val` is the split's own and is seen by probes alone.

    Args:
        frames: The labelled frames.
        tasks: What is fed back and probed.
        more_tasks: The same, beside `tasks`: tasks of the user on a set that has its own.
        unlabelled: Where the stream comes from: "frames" (train frames without their labels),
            folders, zips, npz files, tar shards.
        stream_size: (H, W) of the streamed images. None: that of the frames.
        num_train: Train frames for heads. None: three of five, 512 at most.
        num_meta: Train frames for g_down. None: one of five, 128 at most.
        share: The share of both that feedback has, at least one frame each. The probes' heads have
            all of `num_train` whatever it is.
        seed: The seed of the pools.
        cache_bytes: How much of the labelled frames may stay decoded in memory, in each process
            that reads them.

    Raises:
        MetaVPTError: There is no task, two have one name, or the pools do not fit into the splits.
    """

    def __init__(
        self,
        frames: RGBDFrames,
        tasks: Sequence[DenseTask],
        more_tasks: Sequence[DenseTask] = (),
        unlabelled: Sequence[str] = (FRAMES,),
        stream_size: Sequence[int] | None = None,
        num_train: int | None = None,
        num_meta: int | None = None,
        share: float = 1.0,
        seed: int = 0,
        cache_bytes: int = 1_000_000_000,
    ) -> None:
        self.frames = CachedFrames(frames, cache_bytes)
        self.tasks = [*tasks, *more_tasks]
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise MetaVPTError(
                f"{frames.name}: has the tasks {', '.join(names) or 'none'}; at least one is "
                "needed, each with a name of its own"
            )
        train = frames.splits["train"]
        num_train = min(512, 3 * len(train) // 5) if num_train is None else num_train
        num_meta = min(128, len(train) // 5) if num_meta is None else num_meta
        if num_train < 1 or num_meta < 1 or num_train + num_meta > len(train):
            raise MetaVPTError(
                f"data.num_train={num_train} and data.num_meta={num_meta} must be positive and "
                f"fit into the {len(train)} train frames "
                f"of {frames.name}"
            )
        if not 0 < share <= 1:
            raise MetaVPTError(
                f"data.share={share}: the share of the labelled frames that feedback has lies in "
                "(0, 1]"
            )
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        fitting, meta, rest = (
            order[:num_train],
            order[num_train : num_train + num_meta],
            order[num_train + num_meta :],
        )
        self.train = sorted(train[i] for i in fitting)
        self.heads = sorted(train[i] for i in fitting[: max(1, round(share * num_train))])
        self.meta = sorted(train[i] for i in meta[: max(1, round(share * num_meta))])
        self.labelled = sorted([*self.heads, *self.meta])
        self.held_out = sorted(train[i] for i in rest or meta)
        self.val = list(frames.splits["val"])
        if leaked := set(train) & set(self.val):
            raise MetaVPTError(
                f"{frames.name}: frame {min(leaked)} and {len(leaked) - 1} more are in the train "
                "and in the val split"
            )
        if stream_size is not None and (len(stream_size) != 2 or min(stream_size) < 1):
            raise MetaVPTError(
                f"data.stream_size={list(stream_size)}: must be two positive numbers, height and "
                "width"
            )
        height, width = stream_size or frames.size
        self.stream_size = size = (int(height), int(width))
        sources: list[Dataset[Tensor]] = [
            FrameImages(self.frames, train, size)
            if source == FRAMES
            else open_images(Path(source), size)
            for source in unlabelled
        ]
        if not sources:
            raise MetaVPTError(
                "data.unlabelled is empty: name at least one source, 'frames' or a path"
            )
        self.unlabelled: Dataset[Tensor] = (
            sources[0] if len(sources) == 1 else ConcatDataset(sources)
        )
        self._report_overlap()

    def _report_overlap(self) -> None:
        shown = overlap(self.unlabelled, self.frames.frames, self.val)
        total = len(self.unlabelled)  # type: ignore[arg-type]
        if shown:
            say(
                "data:",
                f"{len(shown)} of the {total} unlabelled images are images of the evaluation too, "
                f"the first is {shown[0]}: the learner trains on what it is measured on, without "
                "its labels",
            )


def nyuv2_data(
    path: str | None = None,
    num_classes: int = 13,
    rooms: Mapping[str, Any] | None = None,
    depth: bool = True,
    max_depth: float = MAX_DEPTH,
    crop: bool = True,
    **pools: Any,
) -> DenseData:
    """Open NYUv2 (the official .mat, or the zip layout), see `open_nyuv2` and `DenseData`.

    Without a path, generated rooms are used, and a visible line says so.

    Args:
        path: The file or folder.
        num_classes: 13 or 40.
        rooms: Of generated rooms, see `rooms_file`.
        depth: Whether depth is fed back and probed, beside the classes.
        max_depth: Metres from which on depth is neither learned from nor counted.
        crop: Whether depth is measured within Eigen's crop alone, as is usual.
        pools: What else `DenseData` takes.
    """
    if path is None:
        _announce_rooms("NYUv2", "nyu_depth_v2_labeled.mat")
    frames = open_nyuv2(path, num_classes, rooms)
    depths = [DepthTask(max_depth=max_depth, crop=crop)] if depth else []
    return DenseData(frames, [*depths, segmentation(frames)], **pools)


def ade20k_data(
    path: str | None = None,
    size: Sequence[int] = (512, 512),
    resize: Resize = "cover",
    rooms: Mapping[str, Any] | None = None,
    **pools: Any,
) -> DenseData:
    """ADE20K at `path`, see `ADE20K`; the rest as in `DenseData`.

    Without a path generated rooms stand in for it, their depth unread, with a visible line that
    says so.
    """
    if path is None:
        _announce_rooms("ADE20K", "ADEChallengeData2016")
        frames: RGBDFrames = open_nyuv2(None, rooms=rooms)
    else:
        frames = ADE20K(path, (int(size[0]), int(size[1])), resize)
    return DenseData(frames, [segmentation(frames)], **pools)


def labelled_data(
    path: str,
    images: Places = "images",
    masks: Places | None = None,
    classes: Classes | None = None,
    ignore_index: int | Sequence[int] | None = 255,
    depths: Places | None = None,
    scale: float | None = None,
    train: Places | None = None,
    val: float | Places | None = None,
    size: Sequence[int] | None = None,
    resize: Resize = "cover",
    max_depth: float = MAX_DEPTH,
    **pools: Any,
) -> DenseData:
    """Open the user's own images with masks or depth maps, see `LabelledImages`, `DenseData`."""
    if not max_depth > 0:
        raise MetaVPTError(f"data.max_depth={max_depth}: must be positive, in metres")
    frames = LabelledImages(
        path, images, masks, classes, ignore_index, depths, scale, train, val, size, resize
    )
    tasks: list[DenseTask] = []
    if depths is not None:
        tasks.append(DepthTask(max_depth=max_depth, crop=False))
    if frames.class_names:
        tasks.append(segmentation(frames))
    return DenseData(frames, tasks, **pools)


def segmentation(frames: RGBDFrames) -> SegmentationTask:
    """Return the task of the frames' classes."""
    return SegmentationTask(len(frames.class_names), tuple(frames.class_names))


def _announce_rooms(name: str, file: str) -> None:
    say(
        "data:",
        f"no data.path, so this trains on generated rooms; for {name} give "
        f"data.path=/path/to/{file}",
    )
