"""Labelled frames with their pools beside an unlabelled stream: the data of a dense vision problem."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import ConcatDataset, Dataset

from metavpt.data.images import FrameImages, open_images
from metavpt.data.nyuv2 import open_nyuv2
from metavpt.errors import MetaVPTError

FRAMES = "frames"  # the name, in `unlabelled`, of the images of the labelled train frames


class DenseData:
    """Pools of a labelled set, disjoint, and the unlabelled images.

    path         NYUv2 (official .mat, or the zip layout); None: generated rooms, with a visible line that says so
    unlabelled   where the stream comes from: "frames" (train frames without their labels), folders, zips, npz files
    stream_size  (H, W) of the streamed images; None: that of the frames
    num_train    frames that the feedback heads are fitted on, num_meta frames that g_down is taken on, both from the train split
    share        share of both that feedback has (at least one frame each); the probes' heads have all of `num_train` whatever it is

    The pools are drawn by `seed` and are the same for every run with it. `held_out` are train frames of neither pool (where there are none
    left, the meta frames again): what designer updates do to other frames is measured on them. `val` is the split's own and is seen by
    probes alone.
    """

    def __init__(
        self,
        path: str | None = None,
        num_classes: int = 13,
        unlabelled: Sequence[str] = (FRAMES,),
        stream_size: Sequence[int] | None = None,
        num_train: int = 512,
        num_meta: int = 128,
        share: float = 1.0,
        seed: int = 0,
        rooms: Mapping[str, Any] | None = None,
    ) -> None:
        if path is None:
            Console(stderr=True, soft_wrap=True).print(
                "[bold]data:[/bold] no data.path, so this trains on generated rooms; "
                "for NYUv2 give data.path=/path/to/nyu_depth_v2_labeled.mat"
            )
        self.frames = open_nyuv2(path, num_classes, rooms)
        train = self.frames.splits["train"]
        if num_train < 1 or num_meta < 1 or num_train + num_meta > len(train):
            raise MetaVPTError(
                f"data.num_train={num_train} and data.num_meta={num_meta} must be positive and fit into the {len(train)} train frames "
                f"of {self.frames.name}"
            )
        if not 0 < share <= 1:
            raise MetaVPTError(f"data.share={share}: the share of the labelled frames that feedback has lies in (0, 1]")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        fitting, meta, rest = order[:num_train], order[num_train : num_train + num_meta], order[num_train + num_meta :]
        self.train = sorted(train[i] for i in fitting)
        self.heads = sorted(train[i] for i in fitting[: max(1, round(share * num_train))])
        self.meta = sorted(train[i] for i in meta[: max(1, round(share * num_meta))])
        self.held_out = sorted(train[i] for i in rest or meta)
        self.val = list(self.frames.splits["val"])
        height, width = stream_size or self.frames.size
        size = (int(height), int(width))
        sources: list[Dataset] = [
            FrameImages(self.frames, train, size) if source == FRAMES else open_images(Path(source), size) for source in unlabelled
        ]
        if not sources:
            raise MetaVPTError("data.unlabelled is empty: name at least one source, 'frames' or a path")
        self.unlabelled = sources[0] if len(sources) == 1 else ConcatDataset(sources)
