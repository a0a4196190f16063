"""data2vec at its smallest: real ViT, feedback and probes on generated rooms."""

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from metavpt.hypergradients import params

SMALL = [
    "problem.hidden_at=input",
    "backbone.tail_blocks=1", "backbone.embed_dim=24", "backbone.depth=2", "backbone.num_heads=2",
    "+backbone.patch_size=4",
    "recipe.size=16", "data.rooms={num_frames: 40, size: [32, 48], seed: 0, folder: null}",
    "data.num_train=16", "data.num_meta=8",
    "problem.feature_size=[16, 24]", "problem.batch_size=4", "problem.meta_batch_size=4",
    "problem.feedback_batch_size=4",
]  # fmt: skip
GROUPS = {
    "backbone": "vit_tiny_dinov3",
    "recipe": "crop_small",
    "designer": "feature_network",
    "feedback": "ridge",
}


def maker(folder, *options):
    """make(*overrides, seed=0) -> a fresh problem with `options`; the rooms are in `folder`."""

    def fresh(*overrides, seed=0):
        given = [*options, *overrides]
        chosen = GROUPS | dict(own.split("=", 1) for own in given if own.split("=")[0] in GROUPS)
        with initialize_config_module("metavpt.configs", version_base="1.3"):
            cfg = compose(
                "run",
                [
                    "problem=data2vec_nyuv2",
                    *(f"{group}={choice}" for group, choice in chosen.items()),
                    *SMALL,
                    f"data.rooms.folder={folder}",
                    *(own for own in given if own.partition("=")[0] not in GROUPS),
                ],
            )
        torch.manual_seed(seed)
        return instantiate(cfg.problem, _convert_="all")

    return fresh


class Doubled(torch.nn.Module):
    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe

    def forward(self, images, seed):
        return self.recipe((images / 255).double(), seed)


def in_float64(problem, moving, std):
    """The same in float64, what of the designer is `moving` features drawn anew."""
    for module in (problem.learner, problem.designer, problem.teacher):
        module.double()
    for parameter in moving:
        torch.nn.init.normal_(parameter, std=std)
    problem.designer.recipe = Doubled(problem.designer.recipe)
    return problem


def at(problem):
    """theta, theta_S, an unlabelled batch and g_down."""
    theta = params.detach(params.named(problem.learner))
    aligned = {name: theta[name] for name in problem.aligned_parameters()}
    batch, labelled = next(iter(problem.meta_batches(1))), next(iter(problem.feedback_batches(2)))
    leaves = params.leaves(aligned)
    gradient = torch.autograd.grad(
        problem.feedback_loss({**theta, **leaves}, labelled), list(leaves.values())
    )
    return theta, aligned, batch, dict(zip(leaves, gradient, strict=True))


def slope_of_value(inner, aligned, g_down, phi, direction, step=1e-5):
    """d<g_down, g_pre>/dphi along `direction`, by a central difference."""

    def value(phi):
        leaves = params.leaves(aligned)
        g_pre = torch.autograd.grad(inner(phi)(leaves), list(leaves.values()))
        return sum(float((g * w).sum()) for g, w in zip(g_pre, g_down.values(), strict=True))

    ahead, behind = (value(params.add(phi, direction, alpha=sign * step)) for sign in (1, -1))
    return (ahead - behind) / (2 * step)
