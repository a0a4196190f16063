"""Feedback of closed-form heads: every labelled frame is scored by a head fitted to other frames.

A head that is fitted to few frames says little about what its features are worth: with more
features than frames it reads worse than a constant. Here all labelled frames are used at once.

Letters: L labelled frames, N = h w patches, D width of a feature, C outputs of all tasks together.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from metavpt.dense_tasks.task import DenseTask
from metavpt.distributed import collectives
from metavpt.feedback.dense import check_num_folds, feedback_weights, folds
from metavpt.hypergradients.params import Params
from metavpt.probes.heads import Ridge, patch_moments


class PatchLabels(NamedTuple):
    """Labelled images with their labels per patch.

    Attributes:
        image: uint8 (L, 3, H, W), at the size that the backbone reads.
        target: Mean target of the valid pixels of each patch, (L, C, h, w).
        share: Share of the patch that is valid, (L, C, h, w).
    """

    image: Tensor
    target: Tensor
    share: Tensor


class Residuals(NamedTuple):
    """What cross-fitted heads leave over, for a designer to predict.

    A_n = sum_c values_nc directions_c is the direction in which the feature of patch n must move so
    that the weighted feedback loss falls fastest. Its root mean square is 1 for each task.

    Attributes:
        values: Residual of each output over its root mean square, (L, N, C).
        share: Share of the patch that is valid, (L, N, C).
        directions: (C, D).
    """

    values: Tensor
    share: Tensor
    directions: Tensor


class CrossFitted(nn.Module):
    """L_down = sum_j weight_j (share of the variance of task j that its heads do not explain).

    The frames of a batch are cut into consecutive folds. Ridge heads are fitted to all folds but
    one, in closed form, and score the frames of that one. Frames that stand
    beside each other in a data set often show one scene, so folds are not drawn at random.

    There is no state: losses are pure functions of the features and labels. Several processes
    share the frames of a batch: each scores its own, with heads fitted to the moments of all.

    Args:
        width: D.
        tasks: The tasks of the labelled set.
        penalty: Of the ridge, relative to the mean variance of the standardised features.
        num_folds: Folds.
        through_heads: Whether gradients also pass through the fit of the heads, which follow the
            features. Where they do not, most of a gradient is what another fit takes back.
        weights: `<task>_weight` of each task; 0 leaves it out. None, the default, is 1.
    """

    fitted_by_steps = False

    def __init__(
        self,
        width: int,
        tasks: Sequence[DenseTask],
        penalty: float = 1e-2,
        num_folds: int = 5,
        through_heads: bool = True,
        **weights: float | None,
    ) -> None:
        super().__init__()
        check_num_folds(num_folds)
        self.weights = feedback_weights(tasks, weights)
        self.ridge, self.num_folds, self.through_heads = Ridge(penalty), num_folds, through_heads
        self.tasks = {task.name: task for task in tasks if self.weights[task.name]}
        sizes = [task.num_outputs for task in self.tasks.values()]
        ends = accumulate(sizes)
        self.outputs = {
            name: slice(end - size, end)
            for name, size, end in zip(self.tasks, sizes, ends, strict=True)
        }
        self.num_outputs = sum(sizes)

    def patch_targets(self, frames: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Average label maps over the patches of `grid`: targets and shares, both (B, C, h, w)."""
        made = [task.patch_targets(task.target(frames), grid) for task in self.tasks.values()]
        target = torch.cat([target for target, _ in made], dim=1)
        share = torch.cat([share.expand_as(target) for target, share in made], dim=1)
        return target, share

    def forward(self, features: Tensor, labels: PatchLabels) -> dict[str, Tensor]:
        """Compute the loss of each task.

        Args:
            features: (L, D, h, w). Of several processes: of this one's frames.
            labels: Of the same frames.
        """
        _, target, share = labels
        fitted_to = features if self.through_heads else features.detach()
        errors = self._errors(features, target, self._moments(fitted_to, target, share))
        return {
            name: collectives.summed((share[:, own] * errors[:, own].square()).sum())
            / _variation(target[:, own], share[:, own])
            for name, own in self.outputs.items()
        }

    @torch.no_grad()
    def residuals(self, features: Tensor, labels: PatchLabels) -> Residuals:
        """Return the residuals of this process's frames under heads fitted to other frames.

        Args:
            features: (L, D, h, w).
            labels: Of the same frames.
        """
        _, target, share = labels
        moments = self._moments(features, target, share)
        errors = self._errors(features, target, moments)
        tiny = torch.finfo(errors.dtype).tiny
        count = collectives.summed(share.sum(dim=(0, 2, 3))).clamp_min(1)
        squares = collectives.summed((share * errors.square()).sum(dim=(0, 2, 3)))
        rms = (squares / count).sqrt().clamp_min(tiny)
        values = errors / rms[:, None, None]
        directions = []
        for name, own in self.outputs.items():
            weight, _ = self.ridge.solve(torch.stack(moments[name]).sum(dim=0), features.shape[1])
            direction = rms[own, None] * weight.to(rms)  # (C_j, D)
            squares = ((share * values)[:, own].movedim(1, -1) @ direction).square()
            size = collectives.mean(squares.mean()).sqrt()
            directions.append(self.weights[name] / size.clamp_min(tiny) * direction)
        total = sum(weight**2 for weight in self.weights.values()) ** 0.5
        return Residuals(
            values.flatten(2).transpose(1, 2),
            share.flatten(2).transpose(1, 2),
            torch.cat(directions) / total,
        )

    def _errors(self, features: Tensor, target: Tensor, moments: dict[str, list[Tensor]]) -> Tensor:
        """Compute y - W x - b, (L, C, h, w), with W and b of the folds that a frame is not in."""
        width, errors = features.shape[1], []
        for k, rows in enumerate(self._folds(len(features))):
            rest = [
                torch.stack(folds[:k] + folds[k + 1 :]).sum(dim=0) for folds in moments.values()
            ]
            for own in rest:
                self.ridge.check(own)  # by every process, so that all stop or none
            if rows.start == rows.stop:
                continue
            heads = [self.ridge.solve(own, width) for own in rest]
            weight = torch.cat([weight for weight, _ in heads]).to(features)
            bias = torch.cat([bias for _, bias in heads]).to(features)
            outputs = torch.einsum("bdhw,cd->bchw", features[rows], weight) + bias[:, None, None]
            errors.append(target[rows].to(features) - outputs)
        return torch.cat(errors)

    def _moments(self, features: Tensor, target: Tensor, share: Tensor) -> dict[str, list[Tensor]]:
        """What `Ridge.solve` needs, of each task and fold, summed over processes.

        The backward pass recomputes the rows in float64, which would be the largest tensors of it.
        """
        moments = {
            name: [
                checkpoint(
                    patch_moments,
                    features[rows],
                    target[rows, own],
                    share[rows, own][:, :1],
                    use_reentrant=False,
                )
                for rows in self._folds(len(features))
            ]
            for name, own in self.outputs.items()
        }
        return moments if collectives.size() == 1 else _summed(moments)

    def _folds(self, num_frames: int) -> list[slice]:
        """Cut all frames into folds. Return the rows of each in this process's `num_frames`."""
        first = collectives.rank() * num_frames
        parts = folds(torch.arange(num_frames * collectives.size()), self.num_folds)
        ends = [int(part[-1]) + 1 - first for part in parts]
        cuts = [min(max(end, 0), num_frames) for end in (-first, *ends)]
        return [slice(*cut) for cut in pairwise(cuts)]


def _summed(moments: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """Sum symmetric matrices over processes: the upper halves of all of them at once."""
    upper = [matrix[_upper(matrix)] for folds in moments.values() for matrix in folds]
    parts = iter(collectives.summed(torch.cat(upper)).split([len(part) for part in upper]))
    return {
        name: [_mirrored(matrix, next(parts)) for matrix in folds]
        for name, folds in moments.items()
    }


def _upper(matrix: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return rows, columns


def _mirrored(like: Tensor, upper: Tensor) -> Tensor:
    half = torch.zeros_like(like).index_put(_upper(like), upper)
    return half + half.triu(1).T


def _variation(target: Tensor, share: Tensor) -> Tensor:
    """The weighted sum of squared deviations of targets (L, C, h, w) from their mean, a scalar."""
    dims, tiny = (0, 2, 3), torch.finfo(target.dtype).tiny
    total = collectives.summed((share * target).sum(dims, keepdim=True))
    mean = total / collectives.summed(share.sum(dims, keepdim=True)).clamp_min(tiny)
    return collectives.summed((share * (target - mean).square()).sum()).clamp_min(tiny)


def in_parts(
    function: Callable[[Params, Any], Tensor],
    theta: Params,
    parts: Sequence[Any],
    record: dict[str, float] | None = None,
) -> Tensor:
    """Concatenate function(theta, part) over `parts`, with the memory of one part.

    The forward pass keeps no graph. The backward pass runs each part again, and adds up gradients.

    Args:
        function: Pure; rows first.
        theta: Parameters to differentiate by, by name.
        parts: Inputs of one microbatch each.
        record: Takes the measurements of the backward pass: `g_down_agreement`, the cosine between
            the gradients of the first and of the second half of the parts. Noise makes it 0.
    """
    return _InParts.apply(  # type: ignore[no-any-return]
        function, list(theta), parts, record, *theta.values()
    )


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, function: Any, names: Any, parts: Any, record: Any, *tensors: Tensor
    ) -> Tensor:
        ctx.function, ctx.names, ctx.parts, ctx.record = function, names, parts, record
        ctx.save_for_backward(*tensors)
        theta = dict(zip(names, tensors, strict=True))
        made = [function(theta, part) for part in parts]
        ctx.sizes = [len(rows) for rows in made]
        return torch.cat(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        needed = [k for k, needs in enumerate(ctx.needs_input_grad[4:]) if needs]
        leaves = [tensor.detach() for tensor in ctx.saved_tensors]
        for k in needed:
            leaves[k].requires_grad_()
        theta = dict(zip(ctx.names, leaves, strict=True))
        halves = [[torch.zeros_like(leaves[k]) for k in needed] for _ in range(2)]
        for at, (part, grad) in enumerate(zip(ctx.parts, grads[0].split(ctx.sizes), strict=True)):
            with torch.enable_grad():
                rows = ctx.function(theta, part)
            found = torch.autograd.grad(
                rows, [leaves[k] for k in needed], grad, materialize_grads=True
            )
            for total, gradient in zip(halves[2 * at // len(ctx.parts)], found, strict=True):
                total += gradient
        if ctx.record is not None and len(ctx.parts) > 1:
            ctx.record["g_down_agreement"] = _cosine(*halves)
        by_tensor = dict(zip(needed, (a + b for a, b in zip(*halves, strict=True)), strict=True))
        return (None,) * 4 + tuple(by_tensor.get(k) for k in range(len(leaves)))


def _cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
        return sum(float((u.double() * v.double()).sum()) for u, v in zip(x, y, strict=True))

    norms = (dot(a, a) * dot(b, b)) ** 0.5
    return dot(a, b) / norms if norms else 0.0
