"""The base of dense vision problems: unlabelled stream, feedback from labelled frames, probes."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import ConcatDataset, Dataset
from typing_extensions import override

from metavpt.data.dense import DenseData
from metavpt.data.loader import (
    EndlessBatches,
    FrameLoader,
    ImageLoader,
    JointLoader,
    Readable,
    Skips,
)
from metavpt.designers import figures
from metavpt.distributed import collectives
from metavpt.distributed.fsdp import Shardable
from metavpt.errors import MetaVPTError, check_known
from metavpt.feedback.aggregation import MultipleFeedbacks
from metavpt.feedback.cross_fitted import CrossFitted, PatchLabels, in_parts
from metavpt.feedback.dense import DenseFeedback, RidgeFeedback
from metavpt.hypergradients import params
from metavpt.hypergradients.params import Params
from metavpt.learners.trunk_states import TrunkStates
from metavpt.learners.vit import Backbone, Features, Hidden
from metavpt.objectives.ijepa import normalized_features
from metavpt.probes.dense import DenseProbe
from metavpt.probes.features import SlidingWindow
from metavpt.probes.heads import Fit
from metavpt.probes.spectrum import rankme
from metavpt.probes.summaries import Probe, SideEffects, summarise
from metavpt.problem import Problem
from metavpt.strategies.function_space import SupportsFunctionSpace
from metavpt.training.health import HealthMetric, rank_sign
from metavpt.training.run_log import Reportable
from metavpt.training.streams import Stream

NUM_PICTURES = 4
NUM_WATCHED = 64  # images that tell a collapse
ONE = "labelled"  # the name within of a labelled set that is alone
DenseHeads = DenseFeedback | RidgeFeedback | CrossFitted


class DenseProblem(MultipleFeedbacks, SupportsFunctionSpace, Shardable, Reportable, Problem):
    """A ViT (`learner.backbone`) that is pretrained for dense prediction.

    A subclass adds the learner's head, the designer and the loss.

    Args:
        backbone: The ViT.
        data: One labelled set, or several by name. Of several, a labelled batch holds one batch
            each, feedbacks and metrics are called `<set>/depth`, and the stream is all their
            images.
        feedback: Builds the feedback heads of the set, or of each set by name.
        batch_size: Unlabelled images of a step.
        meta_batch_size: Unlabelled images of a designer update.
        feedback_batch_size: Labelled frames of a batch. None: the whole pool, in order, for
            feedback that is cross-fitted.
        feedback_pool: The labelled frames of g_down: "meta", or "labelled" for these and those that
            heads are fitted on. "labelled" is for feedback that fits its heads within its own batch
            (`RidgeFeedback`, `CrossFitted`).
        head_steps: Steps of the feedback heads before each designer update.
        first_head_steps: The same before the first one.
        trunk_tolerance: Trunk states of labelled frames are reused while the trunk has moved by
            less, relative to its norm, see `TrunkStates`.
        feature_size: (H, W) of labelled frames for the backbone; labels keep their size. None: not
            resized.
        probe_heads: Heads of the probes, by name. None: ridge only.
        probe_size: (H, W) of labelled frames for the probes. None: `feature_size`.
        probe_window: (H, W) of overlapping windows for the probes. None: the whole image.
        probes: Other probes of the frozen backbone by name: side effects, see
            `metavpt.probes.summaries`.
        num_workers: Data workers.
        on_error: "skip": an unreadable unlabelled image is replaced, named and counted. "raise": it
            ends the run.
        seed: The seed of the split into pools.
    """

    def __init__(
        self,
        backbone: Backbone,
        data: DenseData | Mapping[str, DenseData],
        feedback: Callable[..., DenseHeads] | Mapping[str, Callable[..., DenseHeads]],
        batch_size: int = 32,
        meta_batch_size: int = 16,
        feedback_batch_size: int | None = 16,
        feedback_pool: Literal["meta", "labelled"] = "meta",
        head_steps: int = 4,
        first_head_steps: int = 100,
        trunk_tolerance: float = 0.0,
        feature_size: Sequence[int] | None = None,
        probe_heads: Mapping[str, Fit] | None = None,
        probe_size: Sequence[int] | None = None,
        probe_window: Sequence[int] | None = None,
        probes: Mapping[str, Probe] | None = None,
        num_workers: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        seed: int = 0,
    ) -> None:
        check_known(on_error, "problem.on_error", "raise", "skip")
        check_known(feedback_pool, "problem.feedback_pool", "meta", "labelled")
        self.data = data if isinstance(data, DenseData) else MappingProxyType(dict(data))
        self.num_workers = num_workers
        self.batch_size, self.meta_batch_size, self.feedback_batch_size = (
            batch_size,
            meta_batch_size,
            feedback_batch_size,
        )
        self.feedback_pool, self.head_steps, self.first_head_steps = (
            feedback_pool,
            head_steps,
            first_head_steps,
        )
        self.mean, self.std = (
            torch.tensor(values).view(3, 1, 1) for values in (backbone.mean, backbone.std)
        )
        self.feature_size, self.probe_size, window = (
            _size(feature_size, "feature_size"),
            _size(probe_size, "probe_size") or _size(feature_size, "feature_size"),
            _size(probe_window, "probe_window"),
        )
        self._windowed = (
            SlidingWindow(lambda part: self.backbone(part).patches, window, backbone.patch_size)
            if window
            else None
        )
        self._check_sizes(backbone)
        self.trunk_states = TrunkStates(trunk_tolerance)
        self.feedback_record: dict[str, float] = {}
        self._patch_labels: dict[tuple[str, str], PatchLabels] = {}
        self.skips = Skips()
        self.unlabelled = (
            _together(self.sets)
            if on_error == "raise"
            else Readable(_together(self.sets), self.skips)
        )
        self.feedback = nn.ModuleDict(self._feedback_heads(feedback, backbone.width))
        self.feedback_weights = {
            self._called(name, task): weight
            for name, heads in self._feedback.items()
            for task, weight in heads.weights.items()
        }
        self.num_outputs = sum(
            heads.num_outputs for heads in self._feedback.values() if isinstance(heads, CrossFitted)
        )
        self.head_batches = Stream(lambda s: self._labelled("heads", s), seed, "feedback heads")
        self.probe = {
            name: self._dense_probe(data, probe_heads) for name, data in self.sets.items()
        }
        self.side_effects = SideEffects(probes)
        directions = self.side_effects.directions
        for name, probe in self.probe.items():
            for metric, direction in probe.directions.items():
                directions[self._called(name, metric)] = direction
        self.metric_directions = directions

    @torch.no_grad()
    def _check_sizes(self, backbone: Backbone) -> None:
        """A size that the patch does not divide fails here, before any training."""
        for size in {
            given or data.frames.size
            for data in self.sets.values()
            for given in (self.feature_size, self.probe_size)
        }:
            backbone(torch.zeros(1, 3, *size))

    @property
    def sets(self) -> Mapping[str, DenseData]:
        """Return the labelled sets by name."""
        return {ONE: self.data} if isinstance(self.data, DenseData) else self.data

    @property
    def backbone(self) -> Backbone:
        """Return the learner's backbone."""
        return cast(Backbone, self.learner.backbone)

    @property
    def device(self) -> torch.device:
        """Return the learner's device."""
        return next(self.learner.parameters()).device

    @override
    def pretrain_batches(self, seed: int) -> Iterable[Any]:
        return ImageLoader(self.unlabelled, self.batch_size, seed, self.num_workers, self.device)

    def meta_batches(self, seed: int) -> Iterable[Any]:
        """Return unlabelled batches for the designer's updates."""
        return ImageLoader(
            self.unlabelled, self.meta_batch_size, seed, self.num_workers, self.device
        )

    @override
    def feedback_batches(self, seed: int) -> Iterable[Any]:
        return self._labelled(self.feedback_pool, seed)

    def held_out_batches(self, seed: int) -> Iterable[Any]:
        """Return labelled batches that no designer update reads."""
        return self._labelled("held_out", seed)

    def aligned_parameters(self) -> list[str]:
        """Return the last blocks and the final norm, which the feedback shares with pretraining."""
        return [name for name in params.named(self.learner) if name.startswith("backbone.tail.")]

    def tail_parameters(self) -> list[str]:
        """Return all parameters but the trunk's: `pretrain_tail` is a function of any of them."""
        named = params.named(self.learner)
        return [name for name in named if not name.startswith("backbone.trunk.")]

    def warm_up_parameters(self) -> list[str]:
        """Return the parameters outside of the backbone."""
        return [name for name in params.named(self.learner) if not name.startswith("backbone.")]

    def trunks(self) -> list[nn.Module]:
        """The student's and, where there is one, the teacher's."""
        backbones = [
            module
            for module in (self.learner, getattr(self, "teacher", None))
            if module is not None
        ]
        return [
            found.trunk
            for module in backbones
            for found in module.modules()
            if isinstance(found, Backbone)
        ]

    @override
    def feedback_losses(self, theta: Params, batch: Any) -> dict[str, Tensor]:
        losses = {}
        for name, frames in batch.items():
            if isinstance(frames, PatchLabels):
                features = self._features_in_parts(theta, name, frames.image)
            else:
                features = self.patch_features(theta, frames.image)
            of_set = self._feedback[name](features, cast(Any, frames))
            losses |= {self._called(name, task): loss for task, loss in of_set.items()}
        return losses

    def _features_in_parts(self, theta: Params, name: str, images: Tensor) -> Tensor:
        """`patch_features` of many images, with the memory of one microbatch."""
        heads = cast(CrossFitted, self._feedback[name])
        # Gradients through heads that all frames share have no independent halves.
        record = None if heads.through_heads else self.feedback_record
        by_trunk = any(p.requires_grad for p in params.subset(theta, "backbone.trunk.").values())
        if by_trunk:
            return in_parts(
                lambda own, part: self.patch_features({**theta, **own}, part),
                params.subset(theta, ""),
                images.split(self.batch_size),
                record,
            )
        tail = params.subset(theta, "backbone.tail.")
        return in_parts(
            lambda own, hidden: functional_call(self.backbone.tail, own, (hidden,)).patches,
            tail,
            self.states_of(theta, name, images),
            record,
        )

    def hidden_states(self, theta: Params, images: Tensor, seen: Hidden, hidden: Tensor) -> Hidden:
        """Hide patches from the tail: the states of a blank image stand for them.

        Nothing is new to pretrained blocks, and student and teacher share the states of a trunk.

        Args:
            theta: Of the learner.
            images: Normalised, (B, 3, H, W).
            seen: Their trunk states.
            hidden: Patches to hide, bool (B, N).
        """
        trunk, empty = params.subset(theta, "backbone.trunk."), torch.zeros_like(images[:1])
        blank = cast(Hidden, functional_call(self.backbone.trunk, trunk, (empty,))).tokens
        where = F.pad(hidden, (seen.tokens.shape[1] - hidden.shape[1], 0))[..., None]
        return seen._replace(tokens=torch.where(where, blank, seen.tokens))

    @property
    def frozen_trunk(self) -> bool:
        """Whether no parameter of the trunk is trained, so that the teacher's is the student's."""
        return not any(p.requires_grad for p in self.backbone.trunk.parameters())

    def states_of(self, theta: Params, name: str, images: Tensor) -> list[Hidden]:
        """Return the trunk's states of labelled images of the set `name`, by microbatches.

        Those of all frames of a pool are kept, see `TrunkStates`.
        """
        return self.trunk_states(
            self.backbone.trunk,
            params.subset(theta, "backbone.trunk."),
            None if self.feedback_batch_size else (name, images.data_ptr()),
            lambda: [
                self.normalize(part, self.feature_size) for part in images.split(self.batch_size)
            ],
        )

    def heads(self) -> list[str]:
        """Return the attributes that `fit_heads` writes."""
        return ["feedback", "head_batches"]

    def is_target_metric(self, metric: str) -> bool:
        """Return whether a feedback of positive weight is about this metric."""
        return any(
            self.feedback_weights[self._called(name, task.name)]
            and metric.startswith(self._called(name, ""))
            and f"/{task.prefix}_" in metric
            for name, data in self.sets.items()
            for task in data.tasks
        )

    @override
    def fit_heads(self) -> None:
        by_steps = {
            name: heads
            for name, heads in self._feedback.items()
            if isinstance(heads, DenseFeedback)
        }
        num_steps = self.head_steps if self.head_batches.has_begun else self.first_head_steps
        theta = params.detach(params.named(self.learner))
        # As many batches at once as a step has images: a sharded trunk is then gathered once.
        together = max(1, self.batch_size // (self.feedback_batch_size or self.batch_size))
        for first in range(0, num_steps if by_steps else 0, together):
            num = min(together, num_steps - first)
            batches = [next(self.head_batches) for _ in range(num)]
            for name, heads in by_steps.items():
                frames = [batch[name] for batch in batches]
                with torch.no_grad():
                    features = self.patch_features(theta, torch.cat([own.image for own in frames]))
                for part, own in zip(features.chunk(num), frames, strict=True):
                    heads.fit(
                        collectives.gather(part), collectives.gather(own)
                    )  # alike on every process

    @torch.no_grad()
    def output_values(self, theta: Params, batch: Any) -> dict[str, Tensor]:
        """Compute the residuals of cross-fitted heads on features of labelled frames.

        The features are the teacher's, normalised, where there is a teacher: those that the student
        is to predict. The directions of the heads go to the designer.
        """
        if not isinstance(getattr(self.designer, "directions", None), Tensor):
            raise MetaVPTError(
                f"strategy=functional: designer {type(self.designer).__name__} predicts no "
                "residuals; set designer=residuals, patch_policy or feature_policy with data2vec, "
                "designer=view_policy with dino"
            )
        found: list[dict[str, Tensor]] = []
        directions: list[Tensor] = []
        for name, labels in batch.items():
            heads = self._feedback[name]
            if not (isinstance(heads, CrossFitted) and isinstance(labels, PatchLabels)):
                raise MetaVPTError(
                    f"designer {type(self.designer).__name__} needs feedback=cross_fitted"
                )
            parts = self.states_of(theta, name, labels.image)
            tail = self.reference.tail
            features = torch.cat([normalized_features(tail(part).patches) for part in parts])
            grid = parts[0].grid
            residuals = heads.residuals(features.transpose(1, 2).unflatten(2, grid), labels)
            num, before = len(features), sum(len(rows) for rows in directions)
            after = self.num_outputs - before - heads.num_outputs
            found.append(
                {
                    "states": torch.cat([part.tokens[:, -features.shape[1] :] for part in parts]),
                    "features": features,
                    "values": F.pad(residuals.values, (before, after)),
                    "share": F.pad(residuals.share, (before, after)),
                    "grid": torch.tensor(grid, device=features.device).expand(num, 2),
                }
            )
            directions.append(residuals.directions)
        if len({tuple(part["grid"][0].tolist()) for part in found}) > 1:
            raise MetaVPTError(
                "labelled sets whose frames differ in size make no values together; "
                "set problem.feature_size"
            )
        policy: Any = self.designer
        policy.directions.copy_(torch.cat(directions) / len(directions) ** 0.5)
        return {key: torch.cat([part[key] for part in found]) for key in found[0]}

    def describe_heads(self, labelled: Any) -> None:
        """Give the designer the directions of cross-fitted heads, if it predicts residuals."""
        if isinstance(getattr(self.designer, "directions", None), Tensor):
            self.output_values(params.detach(params.named(self.learner)), labelled)

    def designer_loss(self, replay: dict[str, Tensor]) -> Tensor:
        """Compute the designer's loss on stored values."""
        return cast(Any, self.designer).loss(replay)

    @property
    def reference(self) -> Backbone:
        """The backbone whose features are predicted: the teacher's, or the learner's own."""
        teacher = getattr(self, "teacher", None)
        if teacher is None:
            return self.backbone
        learner = teacher.learner
        return learner if isinstance(learner, Backbone) else cast(Backbone, learner.backbone)

    @override
    def evaluate(self) -> dict[str, float]:
        metrics = self.side_effects(self._describe, self.unlabelled)
        for name, probe in self.probe.items():
            metrics |= {
                self._called(name, metric): value
                for metric, value in probe(self._frozen_features).items()
            }
        return metrics

    def class_metrics(self) -> dict[str, list[tuple[str, float | None]]]:
        """Return metrics of each class by head, such as the IoU, with the names of the classes."""
        return {
            self._called(name, metric): [(k, None if math.isnan(v) else v) for k, v in values]
            for name, probe in self.probe.items()
            for metric, values in probe.class_metrics.items()
        }

    def trivial_metrics(self) -> dict[str, dict[str, float]]:
        """Score predictions that ignore the image, of every labelled set together."""
        scores: dict[str, dict[str, float]] = {}
        for name, probe in self.probe.items():
            for predictor, metrics in probe.trivial_metrics().items():
                own = {self._called(name, metric): value for metric, value in metrics.items()}
                scores.setdefault(predictor, {}).update(own)
        return scores

    def patch_features(self, theta: Params, images: Tensor) -> Tensor:
        """Features (B,D,h,w) of images uint8 (B,3,H,W) under the learner's parameters `theta`."""
        normalized = self.normalize(images, self.feature_size)
        return functional_call(
            self.backbone, params.subset(theta, "backbone."), (normalized,)
        ).patches

    def normalize(self, images: Tensor, size: tuple[int, int] | None) -> Tensor:
        """uint8 (B,3,H,W) -> what the backbone reads, at `size`; None: at their own."""
        images = images.to(next(self.learner.parameters())) / 255
        if size and images.shape[-2:] != size:
            images = _resized(images, size)
        return (images - self.mean.to(images)) / self.std.to(images)

    def health_metrics(self) -> dict[str, HealthMetric]:
        """Return the rank of the features."""
        features = summarise(self._describe, [self._watched()]).double()
        return {"feature_rank": rank_sign(rankme(features - features.mean(dim=0)))}

    @override
    def counters(self) -> dict[str, float]:
        return {"skipped_images": self.skips.total} if self.skips.total else {}

    def figures(self) -> dict[str, np.ndarray]:
        """Draw predictions of the probe's first head beside the truth, for a few frames."""
        return {
            self._called(name, "predictions").replace("/", "_"): self._predictions(name)
            for name in self.sets
        }

    def _predictions(self, name: str) -> np.ndarray:
        data = self.sets[name]
        frames = [
            data.frames[i]
            for i in data.val[:: max(1, len(data.val) // NUM_PICTURES)][:NUM_PICTURES]
        ]
        predicted = self.probe[name].predict(
            self._frozen_features, torch.stack([frame.image for frame in frames])
        )
        rows = [[figures.photo(frame.image)] for frame in frames]
        columns, legend = ["image"], list[tuple[np.ndarray, str]]()
        for task in data.tasks:
            truth = [task.target(frame) for frame in frames]
            pairs = list(zip(truth, predicted[task.name], strict=True))
            for row, (true, guess) in zip(rows, pairs, strict=True):
                row += [task.picture(true, true), task.picture(guess, true)]
            columns += [f"true {task.name}", f"predicted {task.name}"]
            legend += task.legend([shown for pair in pairs for shown in pair])
        return figures.with_legend(figures.titled(figures.grid(rows), columns), legend)

    def _watched(self) -> Tensor:
        """A few of the unlabelled images, uint8 (B,3,H,W): the same ones each time."""
        total: int = len(self.unlabelled)  # type: ignore[arg-type]
        count = min(NUM_WATCHED, total)
        return torch.stack([self.unlabelled[i * total // count] for i in range(count)]).to(
            self.device
        )

    @torch.no_grad()
    def _frozen_features(self, images: Tensor) -> Tensor:
        """What the probes of labelled frames read, (B,D,h,w)."""
        images = self.normalize(images, self.probe_size)
        return self._windowed(images) if self._windowed else self.backbone(images).patches

    @torch.no_grad()
    def _describe(self, images: Tensor) -> Features:
        """What the other probes read: images at the nearest size that the patches divide."""
        patch = self.backbone.patch_size
        height, width = (max(1, round(side / patch)) * patch for side in images.shape[-2:])
        return self.backbone(self.normalize(images, (height, width)))

    @property
    def _feedback(self) -> dict[str, DenseHeads]:
        return cast(dict[str, DenseHeads], dict(self.feedback.items()))

    def _feedback_heads(self, feedback: Any, width: int) -> dict[str, DenseHeads]:
        makers = feedback if isinstance(feedback, Mapping) else {ONE: feedback}
        if makers.keys() != self.sets.keys():
            raise MetaVPTError(
                f"feedback names {', '.join(makers)}, data names {', '.join(self.sets)}; "
                "give both the same names"
            )
        return {name: makers[name](width, data.tasks) for name, data in self.sets.items()}

    def _dense_probe(self, data: DenseData, heads: Mapping[str, Fit] | None) -> DenseProbe:
        def in_order(indices: list[int]) -> Iterable[Any]:
            size = self.feedback_batch_size or self.batch_size
            return FrameLoader.in_order(data.frames, indices, size, self.device)

        return DenseProbe(
            lambda: in_order(data.train),
            lambda: in_order(data.val),
            data.tasks,
            heads,
        )

    def _labelled(self, pool: str, seed: int) -> JointLoader:
        return JointLoader({name: self._labelled_of(name, pool, seed) for name in self.sets})

    def _labelled_of(self, name: str, pool: str, seed: int) -> Any:
        data, heads = self.sets[name], self._feedback[name]
        if isinstance(heads, CrossFitted):
            pool = "held_out" if pool == "held_out" else "labelled"
            return PatchLoader(
                lambda: self._read_patch_labels(name, pool), self.feedback_batch_size, seed
            )
        if self.feedback_batch_size is None:
            raise MetaVPTError(
                "problem.feedback_batch_size=null takes all labelled frames at once, "
                "which only feedback=cross_fitted can; set a number"
            )
        return FrameLoader(
            data.frames,
            getattr(data, pool),
            self.feedback_batch_size,
            seed,
            self.num_workers,
            self.device,
        )

    @torch.no_grad()
    def _read_patch_labels(self, name: str, pool: str) -> PatchLabels:
        """Read all frames of a pool, once: images at the backbone's size, labels per patch."""
        if (name, pool) not in self._patch_labels:
            data, heads = self.sets[name], cast(CrossFitted, self._feedback[name])
            frames, patch, parts = getattr(data, pool), self.backbone.patch_size, []
            for batch in FrameLoader.in_order(data.frames, frames, 16, self.device):
                image = batch.image
                if self.feature_size and image.shape[-2:] != self.feature_size:
                    image = _resized(image.float(), self.feature_size).round().clamp(0, 255).byte()
                grid = (image.shape[-2] // patch, image.shape[-1] // patch)
                parts.append(PatchLabels(image, *heads.patch_targets(batch, grid)))
            self._patch_labels[name, pool] = PatchLabels(*map(torch.cat, zip(*parts, strict=True)))
        return self._patch_labels[name, pool]

    def _called(self, name: str, what: str) -> str:
        """Name `what` of the labelled set `name`: <set>/<what> if there are several sets."""
        return what if isinstance(self.data, DenseData) else f"{name}/{what}"


class PatchLoader:
    """Endless batches of `PatchLabels`; `skip` and `share` as in `ImageLoader`.

    Args:
        read: Returns those of all frames.
        batch_size: Frames of a batch, drawn at random. None: all of them, in their order.
        seed: Of the draws.
    """

    def __init__(self, read: Callable[[], PatchLabels], batch_size: int | None, seed: int) -> None:
        self.read, self.batch_size, self.seed = read, batch_size, seed
        self.first, self.part = 0, (0, 1)

    def skip(self, num_batches: int) -> None:
        """Start at this batch."""
        self.first = num_batches

    def share(self, rank: int, size: int) -> None:
        """Give this rank's rows of each batch alone."""
        self.part = (rank, size)

    def __iter__(self) -> Iterator[PatchLabels]:
        labels = self.read()
        num, (rank, size) = len(labels.image), self.part
        if (self.batch_size or num) % size:
            raise MetaVPTError(
                f"{size} processes cannot share {self.batch_size or num} labelled frames alike; "
                "set data.num_train and data.num_meta, or problem.feedback_batch_size, to a "
                "multiple"
            )
        if self.batch_size is None or self.batch_size >= num:
            own = PatchLabels(
                *(field[rank * num // size : (rank + 1) * num // size] for field in labels)
            )
            while True:
                yield own
        for rows in EndlessBatches(num, self.batch_size, self.seed, self.first, self.part):
            yield PatchLabels(*(field[rows] for field in labels))


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def _size(size: Sequence[int] | None, option: str) -> tuple[int, int] | None:
    if not size:
        return None
    if len(size) != 2 or min(size) < 1:
        raise MetaVPTError(f"problem.{option}={list(size)}: give height and width, at least 1 each")
    return int(size[0]), int(size[1])


def _together(sets: Mapping[str, DenseData]) -> Dataset[Tensor]:
    """The unlabelled images of all sets."""
    if len({data.stream_size for data in sets.values()}) > 1:
        listed = ", ".join(
            f"{name} {data.stream_size[0]}x{data.stream_size[1]}" for name, data in sets.items()
        )
        raise MetaVPTError(
            f"the images of one stream must have one size, these are {listed}; "
            "set data.<set>.stream_size"
        )
    return (
        ConcatDataset([data.unlabelled for data in sets.values()])
        if len(sets) > 1
        else next(iter(sets.values())).unlabelled
    )
