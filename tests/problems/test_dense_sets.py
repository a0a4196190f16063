"""Problems on ADE20K and on two labelled sets at once, and what is measured beside the feedback."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training import adam, train
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from metavpt import Learned, OneStep
from metavpt.hypergradients import params

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "backbone.tail_blocks=1", "backbone.embed_dim=24", "backbone.depth=2", "backbone.num_heads=2",
    "recipe.global_size=16", "recipe.local_size=8", "recipe.num_local=2", "designer.network.base=4",
    "designer.network.depth=1",
    "problem.feature_size=[16, 24]", "problem.num_prototypes=32", "problem.head_hidden=16",
    "problem.head_bottleneck=8",
    "problem.batch_size=4", "problem.meta_batch_size=4", "problem.feedback_batch_size=4",
    "problem.head_steps=1", "problem.first_head_steps=2",
]  # fmt: skip
ROOMS = {"num_frames": 24, "size": [32, 48], "seed": 0}
NAMES = {
    "dino_masks": ["data"],
    "dino_ade20k": ["data"],
    "dino_dense": ["data.nyuv2", "data.ade20k"],
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make(name, *overrides, probes={}) -> a fresh problem on small rooms."""
    folder = tmp_path_factory.mktemp("rooms")

    def fresh(name, *overrides, probes=None):
        data = []
        for seed, key in enumerate(NAMES[name]):
            data += [
                f"{key}.rooms={{num_frames: 24, size: [32, 48], seed: {seed}, folder: {folder}}}"
            ]
            data += [f"{key}.num_train=8", f"{key}.num_meta=4", f"{key}.stream_size=[32,48]"]
        with initialize_config_module("metavpt.configs", version_base="1.3"):
            cfg = compose("run", [f"problem={name}", *SMALL, *data, *overrides])
        OmegaConf.set_struct(cfg, False)
        cfg.problem.probes = probes
        torch.manual_seed(0)
        return instantiate(cfg.problem, _convert_="all")

    return fresh


def shipped(name, **changes):
    """The configuration of a probe as it is shipped."""
    found = OmegaConf.to_container(OmegaConf.load(CONFIGS / "probe" / f"{name}.yaml"))
    assert isinstance(found, dict)
    return {**found, **changes}


def labelled(problem):
    return next(iter(problem.feedback_batches(0)))


def test_ade20k_is_fed_back_and_probed_without_depth(make):
    problem = make("dino_ade20k")
    assert problem.feedback_losses(params.named(problem.learner), labelled(problem)).keys() == {
        "segmentation"
    }
    assert problem.evaluate().keys() == {
        "ridge/seg_miou",
        "ridge/seg_miou_present",
        "ridge/seg_acc",
    }
    assert (
        problem.figures()["predictions"].shape[1] == 3 * 48 + 2 * 2
    )  # photograph, true and predicted classes
    with pytest.raises(
        InstantiationException,
        match=r"feedback\.depth_weight=1.* is read without depth; set it to 0",
    ):
        make("dino_ade20k", "feedback.depth_weight=1")


def test_two_sets_are_two_named_feedbacks(make):
    """Each loss is that of its own heads on its own frames."""
    problem = make(
        "dino_dense", "feedback.nyuv2.depth_weight=2.0", "feedback.ade20k.segmentation_weight=0.5"
    )
    assert problem.feedback_weights == {
        "nyuv2/depth": 2.0,
        "nyuv2/segmentation": 0,
        "ade20k/segmentation": 0.5,
    }
    problem.fit_heads()
    theta, batch = params.detach(params.named(problem.learner)), labelled(problem)
    assert not torch.equal(batch["nyuv2"].image, batch["ade20k"].image)
    losses = problem.feedback_losses(theta, batch)
    assert losses.keys() == {"nyuv2/depth", "ade20k/segmentation"}
    for name, loss in losses.items():
        where, task = name.split("/")
        alone = problem.feedback[where](
            problem.patch_features(theta, batch[where].image), batch[where]
        )
        assert torch.equal(loss, alone[task])
    total = problem.feedback_loss(theta, batch)
    torch.testing.assert_close(
        total, 2.0 * losses["nyuv2/depth"] + 0.5 * losses["ade20k/segmentation"]
    )


def test_the_stream_is_the_images_of_both_sets(make):
    problem = make("dino_dense")
    parts = [data.unlabelled for data in problem.data.values()]
    assert len(problem.unlabelled) == sum(map(len, parts))
    assert torch.equal(problem.unlabelled[0], parts[0][0])
    assert torch.equal(problem.unlabelled[len(parts[0])], parts[1][0])
    with pytest.raises(
        InstantiationException, match=r"nyuv2 32x48, ade20k 8x8; set data\.<set>\.stream_size"
    ):
        make("dino_dense", "data.ade20k.stream_size=[8, 8]")


def test_what_each_set_is_steered_for_is_known_by_name(make):
    problem = make("dino_dense")
    steered = {name: problem.is_target_metric(name) for name in problem.evaluate()}
    assert {name for name, is_target_metric in steered.items() if is_target_metric} == {
        *(
            f"nyuv2/ridge/depth_{metric}{mean}"
            for metric in ("rmse", "abs_rel", "delta1")
            for mean in ("", "_per_image")
        ),
        *(f"ade20k/ridge/seg_{metric}" for metric in ("miou", "miou_present", "acc")),
    }
    assert {name for name, is_target_metric in steered.items() if not is_target_metric} == {
        "nyuv2/ridge/seg_miou",
        "nyuv2/ridge/seg_miou_present",
        "nyuv2/ridge/seg_acc",
    }
    assert set(problem.figures()) >= {"nyuv2_predictions", "ade20k_predictions"}


def test_sets_and_feedbacks_must_have_the_same_names(make):
    with pytest.raises(
        InstantiationException, match=r"feedback names nyuv2, data names nyuv2, ade20k"
    ):
        make("dino_dense", "~feedback.ade20k")


def strategy():
    return Learned(OneStep(), adam, every=1)


def test_two_sets_train_and_resume_exactly_with_what_probes_remember(make, tmp_path):
    """cka/step0 goes on from the features of step 0, not from those of the checkpoint."""
    probes = {"spectrum": shipped("spectrum", num_images=12)}
    whole = make("dino_dense", probes=probes)
    ended = train(tmp_path / "whole", whole, strategy(), steps=3)
    train(tmp_path / "parts", make("dino_dense", probes=probes), strategy(), steps=3)
    sorted((tmp_path / "parts" / "checkpoints").glob("*.pt"))[
        -1
    ].unlink()  # as if killed after step 2
    resumed = train(
        tmp_path / "parts", make("dino_dense", probes=probes), strategy(), steps=3, resume=True
    )
    assert resumed.metrics == ended.metrics
    assert 0 < resumed.metrics["cka/step0"] < 1 - 1e-6
    assert all(
        torch.equal(p, q)
        for p, q in zip(
            whole.learner.parameters(), resumed.problem.learner.parameters(), strict=True
        )
    )


def test_side_effects_are_measured_by_configuration(make, tmp_path):
    rng = np.random.default_rng(0)
    split = np.repeat(np.array([0, 1], np.uint8), 30)
    np.savez(
        tmp_path / "a.npz",
        images=rng.integers(0, 256, (60, 20, 20, 3), dtype=np.uint8),
        label=np.arange(60) % 2,
        split=split,
    )
    heads = shipped("classification")["heads"]
    heads["linear_bn"]["num_steps"] = 5
    probes = {
        "knn": shipped(
            "knn",
            path=str(tmp_path),
            size=[20, 20],
            heads={"nearest": {"_target_": "metavpt.probes.knn.KNN", "k": 3}},
        ),
        "classification": shipped("classification", path=str(tmp_path), size=[20, 20], heads=heads),
        "spectrum": shipped("spectrum", num_images=8),
    }
    problem = make("dino_masks", probes=probes)
    before = copy.deepcopy(params.named(problem.learner))
    metrics = problem.evaluate()
    added = {
        "nearest/accuracy",
        "knn/accuracy",
        "ridge/accuracy",
        "linear_bn/accuracy",
        "rank/rankme",
        "cka/step0",
    }
    assert metrics.keys() - make("dino_masks").evaluate().keys() == added
    assert not any(problem.is_target_metric(name) for name in added)
    directions = problem.metric_directions
    assert directions.keys() == metrics.keys() - {"cka/step0"}  # neither way is better for it
    assert all(directions[name] == "higher" for name in added - {"cka/step0"})
    assert 1 <= metrics["rank/rankme"] <= 8.01
    assert metrics["cka/step0"] == pytest.approx(1)
    assert all(torch.equal(p, before[name]) for name, p in params.named(problem.learner).items())


def test_probes_may_see_frames_at_another_size_and_by_windows(make):
    plain, larger, windowed, whole = (
        make("dino_masks", *options).evaluate()
        for options in (
            [],
            ["+problem.probe_size=[32, 48]"],
            ["+problem.probe_size=[32, 48]", "+problem.probe_window=[16, 16]"],
            ["+problem.probe_size=[32, 48]", "+problem.probe_window=[32, 48]"],
        )
    )
    assert larger == whole
    assert len({metrics["ridge/depth_rmse"] for metrics in (plain, larger, windowed)}) == 3
    with pytest.raises(InstantiationException, match="20x24"):
        make("dino_masks", "+problem.probe_size=[20, 24]")
    with pytest.raises(InstantiationException, match="probe_window=12x16"):
        make("dino_masks", "+problem.probe_window=[12, 16]")


@pytest.mark.parametrize(
    "option",
    ["problem.feature_size=[-16, 24]", "problem.feature_size=[0, 0]", "+problem.probe_size=[16]",
     "+problem.probe_window=[16, 0]"],
)  # fmt: skip
def test_a_size_without_pixels_is_named(make, option):
    key = option.partition("=")[0].removeprefix("+").replace(".", r"\.")
    with pytest.raises(InstantiationException, match=rf"{key}=\[.*height and width"):
        make("dino_masks", option)
