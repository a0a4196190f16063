"""Stand-ins for labelled sets and text, as large as the real ones, to plan a run without data."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from metavpt.data.ade20k import CLASS_NAMES
from metavpt.data.dense import FRAMES, DenseData, segmentation
from metavpt.data.frames import Frame, RGBDFrames
from metavpt.data.language import Source, TokenData
from metavpt.data.mixture import Component
from metavpt.data.own_text import NAME
from metavpt.data.tokens import Corpus, Encoded, Encoder
from metavpt.dense_tasks.depth import MAX_DEPTH, DepthTask
from metavpt.dense_tasks.task import DenseTask
from metavpt.errors import MetaVPTError


class AbsentFrames(RGBDFrames):
    """The name, size, classes and splits of frames; there is none to read."""

    def __init__(
        self, name: str, size: Sequence[int], num_classes: int, num_train: int, num_val: int
    ) -> None:
        self.name, self.size = name, (int(size[0]), int(size[1]))
        self.class_names = [str(i) for i in range(num_classes)]
        self.splits = {
            "train": list(range(num_train)),
            "val": list(range(num_train, num_train + num_val)),
        }

    def __len__(self) -> int:
        return sum(len(split) for split in self.splits.values())

    def __getitem__(self, index: int) -> Frame:
        raise MetaVPTError(f"{self.name} is absent: its frames cannot be read")

    @override
    def image(self, index: int) -> Tensor:
        return self[index].image


def absent_nyuv2(
    num_classes: int = 13,
    path: Any = None,
    rooms: Any = None,
    unlabelled: Any = None,
    depth: bool = True,
    max_depth: float = MAX_DEPTH,
    crop: bool = True,
    **pools: Any,
) -> DenseData:
    """As `nyuv2_data` at the official file; what names a file is not read."""
    frames = AbsentFrames("NYUv2", (480, 640), num_classes, 795, 654)
    depths = [DepthTask(max_depth=max_depth, crop=crop)] if depth else []
    return _pools(frames, [*depths, segmentation(frames)], **pools)


def absent_ade20k(
    size: Sequence[int] = (512, 512),
    path: Any = None,
    resize: Any = None,
    rooms: Any = None,
    unlabelled: Any = None,
    **pools: Any,
) -> DenseData:
    """As `ade20k_data` at ADEChallengeData2016; what names a file is not read."""
    frames = AbsentFrames("ADE20K", size, len(CLASS_NAMES), 20210, 2000)
    return _pools(frames, [segmentation(frames)], **pools)


def absent_labelled(
    path: Any = None,
    classes: Any = None,
    depths: Any = None,
    size: Sequence[int] | None = None,
    unlabelled: Any = None,
    **options: Any,
) -> DenseData:
    """As `labelled_data`, with 1000 images of the size that is asked for."""
    if size is None:
        raise MetaVPTError(
            "trainer.dry_run=true: no image is read; give their size by data.size=[H,W]"
        )
    num_classes = 0 if classes is None else classes if isinstance(classes, int) else len(classes)
    pools = ("more_tasks", "stream_size", "num_train", "num_meta", "share", "cache_bytes")
    frames = AbsentFrames("your images", size, num_classes, 800, 200)
    tasks: list[DenseTask] = [DepthTask()] if depths is not None else []
    tasks += [segmentation(frames)] if num_classes else []
    return _pools(frames, tasks, **{key: options[key] for key in pools if key in options})


class AbsentLanguage:
    """As `LanguageData`, with rows that are full; no source is read."""

    def __init__(
        self,
        stream: Mapping[str, Source],
        feedback: Mapping[str, Any],
        num_feedback: int = 1024,
        num_held_out: int = 256,
        **files: Any,
    ) -> None:
        self.stream, self.domains = stream, list(feedback)
        self.num_feedback, self.num_held_out = num_feedback, num_held_out

    def texts(self) -> Iterator[str]:
        """Return nothing to train a tokenizer on."""
        return iter(())

    def encode(self, tokenizer: Any, length: int) -> TokenData:
        """Return `TokenData` of full rows, without test problems."""
        row = Encoded(np.zeros(length, dtype=np.int32), 0)
        components = [
            Component(Corpus([row]), source.weight, source.domain)
            for source in self.stream.values()
        ]
        pools = (
            {name: Corpus(repeat(row, max(count, 1))) for name in self.domains}
            for count in (self.num_feedback, self.num_held_out)
        )
        return TokenData(Encoder(tokenizer, length), components, *pools, test={}, general={})


def absent_text(
    num_feedback: int | None = None, num_held_out: int | None = None, **files: Any
) -> AbsentLanguage:
    """As `text_data`; where no number of answers is stated, those of `LanguageData`."""
    stated = {"num_feedback": num_feedback, "num_held_out": num_held_out}
    numbers = {name: count for name, count in stated.items() if count is not None}
    return AbsentLanguage({"text": Source((), domain=NAME)}, {NAME: None}, **numbers)


def _pools(frames: AbsentFrames, tasks: Sequence[DenseTask], **pools: Any) -> DenseData:
    with torch.device(
        "cpu"
    ):  # the pools are drawn, also where everything else is on the meta device
        return DenseData(frames, tasks, unlabelled=(FRAMES,), **pools)
