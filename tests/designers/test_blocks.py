import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Generator, Tensor, nn

from metavpt.designers.blocks import BlockMasks, block_size, context_patches, random_blocks
from metavpt.designers.crop import RandomCrop
from metavpt.designers.patches import PatchScores
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params


class Batch(NamedTuple):
    images: Tensor
    seed: int


def batch(seed: int = 7) -> Batch:
    return Batch(torch.rand(3, 3, 60, 70, generator=Generator().manual_seed(0)), seed)


def designer(moved: bool = False, size: int = 56, **options: Any) -> BlockMasks:
    torch.manual_seed(0)
    network = PatchScores(patch_size=4, width=8)
    if moved:
        nn.init.normal_(network.out.weight, std=0.5)
    return BlockMasks(RandomCrop((0.5,) * 3, (0.25,) * 3, size=size), 4, network, **options)


def corners(block: list[int], columns: int) -> tuple[int, int, int, int]:
    """(top, left, h, w) of a block, or an error if its patches are no full rectangle."""
    rows, cols = sorted({n // columns for n in block}), sorted({n % columns for n in block})
    assert sorted(block) == [
        r * columns + c for r in range(rows[0], rows[-1] + 1) for c in range(cols[0], cols[-1] + 1)
    ]
    return rows[0], cols[0], len(rows), len(cols)


def test_block_sizes_have_the_papers_scales_and_aspects() -> None:
    rng = Generator().manual_seed(0)
    sizes = torch.tensor(
        [block_size((300, 300), (0.15, 0.2), (0.75, 1.5), rng) for _ in range(2000)]
    ).double()  # rounding is under 1 %
    for values, (low, high) in (
        (sizes.prod(1) / 300**2, (0.15, 0.2)),
        (sizes[:, 0] / sizes[:, 1], (0.75, 1.5)),
    ):
        assert 0.99 * low < values.min() < values.max() < 1.01 * high
        assert values.mean().item() == pytest.approx((low + high) / 2, rel=0.02)  # uniform between
    assert {block_size((14, 14), (0.85, 1.0), (1.0, 1.0), rng) for _ in range(100)} == {
        (13, 13),
        (14, 14),
    }
    assert block_size((2, 9), (0.9, 0.9), (1.0, 1.0), rng) == (2, 4)


def test_blocks_are_rectangles_at_uniform_places() -> None:
    blocks = random_blocks((4, 5), (2, 3), (6000,), Generator().manual_seed(0))
    places = [corners(block, 5)[:2] for block in blocks.tolist()]
    assert {corners(block, 5)[2:] for block in blocks.tolist()} == {(2, 3)}
    counts = [places.count((top, left)) for top in range(3) for left in range(3)]
    assert sum(counts) == 6000
    assert max(abs(count - 6000 / 9) for count in counts) < 4.5 * math.sqrt(
        6000 * (1 / 9) * (8 / 9)
    )


def test_context_is_the_block_without_targets_cut_to_the_smallest() -> None:
    context = torch.tensor([[0, 1, 2, 4, 5, 6], [4, 5, 6, 8, 9, 10]])
    targets = torch.tensor([[0, 1, 0, 1], [10, 11, 11, 15]])
    order = torch.rand(2, 16, generator=Generator().manual_seed(0))
    visible = context_patches(context, targets, order, min_visible=1)
    assert visible.shape == (2, 4)
    assert set(visible[0].tolist()) == {2, 4, 5, 6}
    assert set(visible[1].tolist()) < {4, 5, 6, 8, 9}


def test_a_context_that_targets_cover_takes_what_fewest_of_them_hold() -> None:
    context = torch.tensor([[0, 1, 2, 3]])
    targets = torch.tensor([[0, 1, 2, 0, 1, 0]])
    visible = context_patches(
        context, targets, torch.rand(1, 9, generator=Generator().manual_seed(0)), min_visible=3
    )
    assert visible.tolist() == [[3, 2, 1]]


@pytest.mark.parametrize("estimator", ["straight_through", "relaxed", "score"])
def test_a_new_designer_is_the_recipe_bit_for_bit(estimator) -> None:
    blocks = designer(estimator=estimator)
    task, recipe = blocks(batch()), blocks.recipe_task(batch())
    for name in ("images", "visible", "targets", "visible_weight", "target_weight", "logits"):
        assert torch.equal(getattr(task, name), getattr(recipe, name)), name
    assert task.target_weight.eq(1).all()


@pytest.mark.parametrize("seed", range(8))
def test_tasks_are_four_blocks_of_one_size_and_a_context_apart(seed) -> None:
    blocks = designer(moved=True)
    tasks = [blocks(batch(seed)), *blocks.random_tasks(batch(seed), 2)]
    assert len({task.targets.shape for task in tasks}) == 1
    for task in tasks:
        assert task.targets.shape[:2] == task.target_weight.shape[:2] == (3, 4)
        for b in range(3):
            assert len({corners(block, 14)[2:] for block in task.targets[b].tolist()}) == 1
            visible = set(task.visible[b].tolist())
            assert len(visible) == task.visible.shape[1] >= 4
            assert not visible & set(task.targets[b].flatten().tolist())


def test_blocks_with_higher_logits_are_taken() -> None:
    logits = torch.zeros(500, 196)
    logits.view(500, 14, 14)[:, :, 7:] = 4.0  # what is on the right is to be predicted
    task = designer(num_candidates=32).task(torch.zeros(500, 3, 1, 1), logits, seed=0, draw=0)
    right = (task.targets % 14 >= 7).float().mean().item()
    recipe = designer().task(torch.zeros(500, 3, 1, 1), torch.zeros(500, 196), seed=0, draw=0)
    assert right > 0.85
    assert (recipe.targets % 14 >= 7).float().mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("estimator", ["straight_through", "relaxed", "score"])
def test_gradient_reaches_every_parameter(estimator) -> None:
    blocks = designer(moved=True, estimator=estimator)
    task = blocks(batch())
    w = torch.randn(task.target_weight.shape, generator=Generator().manual_seed(1))
    value = (task.target_weight * w).sum() + (task.log_prob * w[:, 0, 0]).sum()
    assert all(
        g.norm() > 0 for g in torch.autograd.grad(value, list(params.named(blocks).values()))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_targets": 20}, "num_targets=20 must be at least 1 and at most num_candidates=16"),
        ({"target_scale": (0.2, 0.1)}, "target_scale"),
        ({"context_scale": (0.9, 1.1)}, "context_scale"),
        ({"target_aspect": (0.0, 1.0)}, "target_aspect"),
        ({"min_visible": 0}, "min_visible=0"),
        ({"min_visible": 197}, "at most the 196 patches"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(MetaVPTError, match=message):
        designer(**options)
