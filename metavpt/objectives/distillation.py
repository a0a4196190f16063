"""Self-distillation with several terms, as in DINOv2 (arXiv 2304.07193) and DINOv3 (2508.10104).

    dino   the prototypes of an image agree across crops
    ibot   the prototypes of masked patches are predicted
    koleo  the images of a batch lie apart; summed over the 2 global views, as released
    gram   patches are as similar to each other as in an anchor
    features  the teacher's normalised features of all patches are predicted (data2vec)

Each term has one output of the student and, except koleo, one goal. Dicts hold them by the term's
name. The derivative of koleo jumps where another image becomes the nearest one. A
`DifferenceProduct` whose step crosses such a point is wrong there; an `ExactProduct` is not.

Letters: V views, the first 2 of them global, B batch, N patches of a global view, M masked patches
of all global views, K prototypes, D width, T terms.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metavpt.errors import MetaVPTError
from metavpt.objectives.dino import dino_loss
from metavpt.objectives.gram import gram_loss
from metavpt.objectives.ibot import ibot_loss
from metavpt.objectives.koleo import koleo_loss

TERMS = ("dino", "ibot", "koleo", "gram", "features")


def active_terms(terms: Mapping[str, float]) -> dict[str, float]:
    """Return the terms with a positive weight, in the order of TERMS.

    Raises:
        MetaVPTError: A term is unknown, or the weights form no objective.
    """
    unknown = [name for name in terms if name not in TERMS]
    if unknown:
        raise MetaVPTError(f"problem.terms names {unknown[0]!r}; known are {', '.join(TERMS)}")
    if not all(0 <= weight < math.inf for weight in terms.values()) or not any(terms.values()):
        raise MetaVPTError(
            f"problem.terms={dict(terms)}: no weight may be negative and one must be positive"
        )
    return {name: float(terms[name]) for name in TERMS if terms.get(name)}


def term_losses(
    outputs: Mapping[str, Tensor],
    goals: Mapping[str, Tensor],
    hidden: Tensor | None,
    temperature: float = 0.1,
    feature_weights: Tensor | None = None,
) -> Tensor:
    """Compute each term of each image, (T, B), in the order of `outputs`.

    Terms are means over the views (dino: over the pairs of views). koleo is the sum over the two
    global views. The weights of the releases refer to these.

    Args:
        outputs: dino logits (V, B, K), ibot logits (M, K), koleo features (2, B, D), gram features
            (2, B, N, D), features (2, B, N, D).
        goals: dino probabilities (2, B, K), ibot probabilities (M, K), gram features (2, B, N, D'),
            features (2, B, N, D).
        hidden: The masked patches, bool of shape (2, B, N).
        temperature: Of the student.
        feature_weights: Of the squares of `features`, (2, B, N, D) or (2, B, N, 1), mean 1. None:
            all are 1.
    """

    def term(name: str, output: Tensor) -> Tensor:
        if name == "features":
            squares = (output - goals[name]).square()
            squares = squares if feature_weights is None else feature_weights * squares
            return squares.mean(dim=(0, 2, 3))
        return _term(name, output, goals, hidden, temperature)

    return torch.stack([term(name, output) for name, output in outputs.items()])


def _term(
    name: str,
    output: Tensor,
    goals: Mapping[str, Tensor],
    hidden: Tensor | None,
    temperature: float,
) -> Tensor:
    if name == "dino":
        return dino_loss(list(output), goals["dino"], temperature, "none")
    if name == "ibot":
        return hidden_patch_loss(output, goals["ibot"], hidden_of(hidden), temperature)
    if name == "koleo":
        # The released weight (0.1) is for the sum over the global crops, not for their mean.
        return torch.stack([koleo_loss(view, reduction="none") for view in output]).sum(dim=0)
    return (
        gram_loss(output.flatten(0, 1), goals["gram"].flatten(0, 1), "none")
        .unflatten(0, output.shape[:2])
        .mean(dim=0)
    )


def hidden_patch_loss(logits: Tensor, probs: Tensor, hidden: Tensor, temperature: float) -> Tensor:
    """Compute `ibot_loss` of each image, (B,), the mean over 2 views, from masked patches.

    Args:
        logits: (M, K), of the masked patches in order.
        probs: (M, K), of the teacher.
        hidden: The masked patches, bool of shape (2, B, N).
        temperature: Of the student.
    """
    per_patch = ibot_loss(
        logits[:, None], probs[:, None], torch.ones_like(logits[:, :1]), temperature, "none"
    )
    placed = per_patch.new_zeros(hidden.shape).masked_scatter(hidden, per_patch)
    return (placed.sum(dim=2) / hidden.sum(dim=2).clamp_min(1)).mean(dim=0)


def hidden_of(hidden: Tensor | None) -> Tensor:
    """Return the masked patches.

    Raises:
        MetaVPTError: The views mask no patch.
    """
    if hidden is None:
        raise MetaVPTError(
            "problem.terms.ibot: the views hide no patch; the recipe must be a MultiCrop, which "
            "does with a patch_size"
        )
    return hidden


def pack(outputs: Mapping[str, Tensor]) -> Tensor:
    """Concatenate the outputs into one vector, for a `ComposedLoss`. `unpack` is the inverse."""
    return torch.cat([output.flatten() for output in outputs.values()])


def unpack(packed: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Cut a flat tensor into named ones of the given shapes."""
    parts = packed.split([math.prod(shape) for shape in shapes.values()])
    return {
        name: part.view(*shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
