"""Accumulation, compilation, recomputed activations and precisions keep a step's result."""

import pytest
import torch
from channels import Channels
from helpers.two_ranks import Recorded, Small
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch.func import functional_call

from metavpt import Budget, ExactProduct, Fixed, MetaVPTError, OneStep, RunLog, Trainer, Unrolled
from metavpt.hypergradients import params
from metavpt.learners.vit import create_backbone
from metavpt.training.engine import compile_blocks, make_fabric, pick_device


def train(folder, problem=Small, strategy=None, steps=3, optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(0)
    trainer = Trainer(
        problem(),
        strategy or Fixed(),
        Budget(steps=steps),
        RunLog(folder),
        optimizer=lambda g: optimizer(g, lr=1e-3),
        **options,
    )
    trainer.run()
    return trainer


def learned(estimator=None):
    return Recorded(estimator or OneStep(), lambda p: torch.optim.Adam(p, lr=1e-2), every=2)


def distance(a, b):
    return float(params.norm(params.add(a, b, alpha=-1.0)) / params.norm(a))


def weights(trainer):
    return trainer.problem.learner.state_dict()


def test_the_parts_of_a_batch_make_the_step_of_the_whole(tmp_path):
    whole, parts = train(tmp_path / "whole"), train(tmp_path / "parts", accumulate=4)
    assert distance(weights(whole), weights(parts)) < 1e-12
    assert parts.budget.samples == whole.budget.samples


def test_compiled_blocks_run_in_the_step_and_not_in_hypergradients_or_probes(tmp_path):
    calls = []

    def backend(graph, inputs):
        return lambda *args: calls.append(1) or graph(*args)

    class Watching(Recorded):
        def estimate(self, *args):
            before = len(calls)
            found = super().estimate(*args)
            assert len(calls) == before
            return found

    class Probing(Small):
        def evaluate(self):
            before = len(calls)
            found = {
                "mean": float(
                    self._outputs(params.named(self.learner), next(self.pretrain_batches(0)))
                    .mean()
                    .detach()
                )
            }
            assert len(calls) == before
            return found

    eager = train(tmp_path / "eager", strategy=learned(OneStep(product=ExactProduct())))
    strategy = Watching(
        OneStep(product=ExactProduct()), lambda p: torch.optim.Adam(p, lr=1e-2), every=2
    )
    compiled = train(tmp_path / "compiled", Probing, strategy=strategy, compile=backend)
    assert calls
    assert distance(weights(eager), weights(compiled)) < 1e-12
    assert distance(eager.strategy.found[1], compiled.strategy.found[1]) < 1e-12


def test_a_learner_without_blocks_cannot_be_compiled_or_recomputed(tmp_path):
    with pytest.raises(MetaVPTError, match="no blocks"):
        compile_blocks(torch.nn.Linear(2, 2), "eager")
    with pytest.raises(MetaVPTError, match="recompute"):
        train(tmp_path, recompute=True)


def test_recomputed_blocks_have_the_derivatives_of_the_parameters_they_were_called_with():
    """Of both orders, at parameters that are not the module's own."""
    backbone = create_backbone(
        "vit_tiny_dinov3", tail_blocks=1, depth=2, embed_dim=24, num_heads=2
    ).double()
    theta = params.leaves(
        {name: p + 0.1 * torch.randn_like(p) for name, p in params.named(backbone).items()}
    )
    w = params.zip_with(torch.randn_like, theta)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)

    def found():
        loss = lambda t: functional_call(backbone, t, (images,)).patches.square().mean()
        gradient = dict(
            zip(
                theta,
                torch.autograd.grad(loss(theta), list(theta.values()), materialize_grads=True),
                strict=True,
            )
        )
        return gradient, ExactProduct()(loss, theta, w, ({"images": images},)).by[0]

    kept = found()
    backbone.trunk.recompute = backbone.tail.recompute = True
    again = found()
    assert distance(kept[0], again[0]) < 1e-12
    assert distance(kept[1], again[1]) < 1e-12


def test_mixed_precision_is_that_of_the_step_and_not_of_hypergradients(tmp_path):
    plain = train(tmp_path / "plain", Channels, learned(), steps=1)
    mixed = train(
        tmp_path / "mixed", Channels, learned(), steps=1, fabric=make_fabric("cpu", "bf16-mixed")
    )
    assert distance(plain.strategy.found[0], mixed.strategy.found[0]) == 0.0
    assert 0.0 < distance(weights(plain), weights(mixed)) < 1e-2


def test_a_float16_loss_that_is_scaled_too_far_is_skipped_and_scaled_less(tmp_path):
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**30)
    fabric = Fabric(
        accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
    )
    trainer = train(tmp_path, Channels, steps=30, max_failures=25, fabric=fabric)
    skipped = [record for record in trainer.log.records() if record["kind"] == "warning"]
    assert 0 < len(skipped) < 30
    assert scaler.get_scale() == 2.0 ** (30 - len(skipped))
    trained = next(iter(trainer.optimizer.state.values()))["step"]
    assert int(trained) == 30 - len(skipped)


def test_the_fused_optimizer_can_be_unrolled(tmp_path):
    fused = lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True)
    plain, other = (
        train(tmp_path / str(i), Channels, learned(Unrolled(2)), 4, kind)
        for i, kind in enumerate((torch.optim.AdamW, fused))
    )
    assert distance(plain.strategy.found[1], other.strategy.found[1]) < 1e-5


@pytest.mark.parametrize(
    ("asked", "gpus", "has_mps", "chosen"),
    [
        (None, 0, False, "cpu"),
        ("auto", 0, True, "cpu"),  # mps has no float64, so it is taken on request alone
        ("auto", 1, True, "cuda"),
        (None, 2, False, "cuda"),
        ("mps", 0, True, "mps"),
        ("cpu", 1, True, "cpu"),
        ("cuda:1", 2, False, "cuda:1"),
        ("cuda:1", 1, False, None),
        ("cuda", 0, True, None),
        ("mps", 1, False, None),
        ("gpu", 1, True, None),
    ],
)
def test_the_device(monkeypatch, asked, gpus, has_mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    if chosen:
        assert pick_device(asked) == chosen
    else:
        with pytest.raises(MetaVPTError, match=f"device={asked}"):
            pick_device(asked)


def test_mps_is_one_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(MetaVPTError, match="devices=2"):
        make_fabric("mps", devices=2)
