"""The example that rates samples: it finds the corrupted ones, and its figures are right."""

import pytest
import torch
from data_rater import auc, best_by, greedy, image_stream, saved, text_stream, train_rater

TEXT = "the quick brown fox jumps over the lazy dog and runs away. " * 1200


@pytest.mark.parametrize("name", ["images", "text"])
def test_the_rater_finds_what_is_corrupted(name: str) -> None:
    if name == "images":
        pytest.importorskip("sklearn")
    torch.manual_seed(0)
    stream = image_stream(0.5, 0) if name == "images" else text_stream(TEXT, 0.5, 0)
    assert 0.4 < float(stream.is_clean.float().mean()) < 0.6
    rater, num_gradients = train_rater(stream, seed=0, num_updates=12, lifetime=6)
    assert num_gradients == 12 * (1 + 4 * (1 + 1) + 4)  # an unroll of four steps, and the steps
    with torch.no_grad():
        assert auc(rater(stream.samples[:400]), stream.is_clean[:400]) > 0.75


def test_corruption_leaves_clean_rows_feedback_and_test_alone() -> None:
    clean, half = text_stream(TEXT, 0.0, 0), text_stream(TEXT, 0.5, 0)
    assert clean.is_clean.all()
    for field in ("feedback", "test"):
        assert torch.equal(getattr(clean, field), getattr(half, field))
    same = (clean.samples == half.samples).all(1)
    assert same[half.is_clean].all()
    assert not same[~half.is_clean].any()


def test_choices_keep_the_best_of_a_pool_that_is_as_large_as_the_share_asks() -> None:
    stream = text_stream(TEXT, 0.5, 0)
    rng = torch.Generator().manual_seed(0)
    pools = list[int]()

    def score(rows: torch.Tensor) -> torch.Tensor:
        pools.append(len(rows))
        return rows.float().mean(1)

    chosen = best_by(stream, 0.25, score)(stream.learner(), 0, rng)
    assert pools == [4 * len(chosen)]
    pool = stream.samples[stream.draw(pools[0], torch.Generator().manual_seed(0))]
    assert score(chosen).min() >= score(pool).sort(descending=True).values[len(chosen) - 1]


def test_greedy_chooses_samples_whose_gradient_agrees_with_the_feedback() -> None:
    stream = text_stream(TEXT, 0.5, 0)
    torch.manual_seed(0)
    learner = stream.learner()
    chosen = greedy(stream, 0.25)(learner, 0, torch.Generator().manual_seed(0))
    pool = stream.samples[stream.draw(4 * len(chosen), torch.Generator().manual_seed(0))]
    weights = list(learner.parameters())
    g_down = torch.autograd.grad(learner(stream.feedback).mean(), weights)
    values = []
    for row in pool:
        g_row = torch.autograd.grad(learner(row[None]).mean(), weights)
        values.append(float(sum((a * b).sum() for a, b in zip(g_row, g_down, strict=True))))
    best = torch.tensor(values).topk(len(chosen)).indices
    wanted, found = {tuple(row.tolist()) for row in pool[best]}, {tuple(r.tolist()) for r in chosen}
    assert len(wanted & found) >= 0.9 * len(wanted)  # float32: neighbours may change places


def test_figures_of_merit() -> None:
    assert saved([4.0, 3.0, 2.0, 1.0, 0.5], 1.5) == pytest.approx(1 - 2.5 / 4)
    assert saved([4.0, 3.0, 2.0], 1.5) == 0.0
    scores, is_clean = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([False, True, False, True])
    assert auc(scores, is_clean) == pytest.approx(0.75)
