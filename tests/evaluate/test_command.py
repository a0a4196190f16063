"""Weights scored by the command: as the run that made them, from each place they may be in."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.harness_task import TASK
from helpers.own_images import camvid, generate
from helpers.small_language import SMALL, TARGETS
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

import metavpt
from metavpt.errors import MetaVPTError
from metavpt.evaluate.command import evaluate, tables
from metavpt.export.command import export
from metavpt.training.build import build

BACKBONE = [
    "backbone=vit_tiny_dinov3", "backbone.tail_blocks=1", "backbone.embed_dim=24",
    "backbone.depth=2", "backbone.num_heads=2",
]  # fmt: skip
PROBES = [
    "data=segmentation", "data.path=camvid", "data.classes=11", "data.ignore_index=11",
    "problem.feature_size=[32,48]", "problem.batch_size=4", "device=cpu", "probe=classification",
    "problem.probes.classification.path=classified.npz",
    "problem.probes.classification.heads.linear_bn.num_steps=20",
    "problem.probes.classification.heads.knn.k=3",
]  # fmt: skip


def composed(name: str, *options: str) -> Any:
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        return compose(name, list(options))


def score(*options: str) -> dict[str, Any]:
    """What the command writes; Hydra is initialised while it runs, as it is for the user."""
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        return json.loads(evaluate(compose("evaluate", list(options))).read_text())


def finish(folder: Path, *options: str) -> Any:
    """Train two steps, measure, and leave the folder as `run` leaves it; return the trainer."""
    cfg = composed("run", *options, "budget.steps=2")
    trainer = build(cfg, folder, Console(quiet=True))
    trainer.run()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return trainer


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of DINO, what it measured last, its export, and the folder of all."""
    root = tmp_path_factory.mktemp("vision")
    camvid(root / "camvid")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    split = (np.arange(12) >= 8).astype(np.uint8)
    np.savez(root / "classified.npz", images=images, label=np.arange(12) % 2, split=split)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("METAVPT_CACHE", str(root / "cache"))
        small = ["designer.hidden_width=8", "recipe.global_size=32", "recipe.local_size=16"]
        trainer = finish(root / "run", "problem=dino", "strategy=fixed", *BACKBONE, *PROBES, *small)
        for form in ("timm", "transformers"):
            export(root / "run", root / form, format=form)
        yield root, trainer


@pytest.mark.parametrize(
    "weights",
    [["weights=run"], ["weights=timm"], ["weights=transformers"],
     ["weights=timm/timm/model.safetensors", *BACKBONE]],
    ids=["run", "timm", "transformers", "file"],
)  # fmt: skip
def test_the_numbers_are_those_of_the_run(vision: Any, weights: list[str], tmp_path: Path) -> None:
    _, trainer = vision
    found = score(*weights, *PROBES, f"output={tmp_path / 'scores'}")
    assert found["metrics"] == trainer.metrics
    assert {"ridge/seg_miou", "linear_bn/accuracy", "knn/accuracy"} <= found["metrics"].keys()
    assert found["trivial"] == trainer.problem.trivial_metrics()
    assert found["directions"]["ridge/seg_miou"] == "higher"
    assert [len(values) for values in found["classes"].values()] == [11]


def test_other_weights_have_other_numbers(vision: Any, tmp_path: Path) -> None:
    _, trainer = vision
    for k, options in enumerate(
        (
            ["weights=run", "part=teacher"],
            ["weights=vit_tiny_dinov3", *BACKBONE],
            BACKBONE,
        )
    ):
        found = score(*options, *PROBES, f"output={tmp_path / str(k)}")
        assert found["metrics"] != trainer.metrics


def test_the_table_has_the_trivial_predictors_and_every_class(vision: Any, tmp_path: Path) -> None:
    found = score("weights=timm", *PROBES, f"output={tmp_path / 'scores'}")
    console = Console(width=120, record=True)
    for table in tables(found):
        console.print(table)
    shown = console.export_text()
    assert "majority class" in shown
    assert f"{found['metrics']['ridge/seg_miou']:.4g}" in shown
    assert shown.rstrip().splitlines()[-1].split()[0] == "10"


def test_load_gives_the_features_that_the_probes_read(vision: Any) -> None:
    root, trainer = vision
    images = torch.stack([torch.from_numpy(generate(i)[0]).movedim(-1, 0) for i in range(3)])
    expected = trainer.problem._describe(images)
    files = [root / "camvid/images/train" / f"{i:03d}.png" for i in range(3)]
    for source in ("timm", "run"):
        model: Any = metavpt.load(root / source)
        for given in (images, files, [Image.open(file) for file in files]):
            found = model.features(given)
            assert torch.equal(found.patches, expected.patches)
            assert torch.equal(found.cls, expected.cls)
    teacher: Any = metavpt.load(root / "run", part="teacher")
    assert not torch.equal(teacher.features(images).cls, expected.cls)
    assert model.features(files[0], size=(16, 16)).patches.shape[-2:] == (2, 2)


def test_load_and_features_name_what_is_wrong(vision: Any, tmp_path: Path) -> None:
    root, _ = vision
    model: Any = metavpt.load(root / "timm")
    large = Image.new("RGB", (64, 64))
    for images, words in (
        (torch.zeros(2, 3, 8, 8), "uint8"),
        ([root / "camvid/images/train/000.png", large], "one size"),
        (tmp_path / "none.png", "none.png"),
    ):
        with pytest.raises(MetaVPTError, match=words):
            model.features(images)
    with pytest.raises(MetaVPTError, match=r"no config\.yaml"):
        metavpt.load(tmp_path)


def test_weights_that_do_not_fit_are_named(vision: Any, tmp_path: Path) -> None:
    for options, words in (
        (["weights=nothing.safetensors", *PROBES], "nothing.safetensors"),
        (["weights=timm", *SMALL, *TARGETS, "device=cpu"], "weights=timm: needs"),
    ):
        with pytest.raises(Exception, match=words):
            score(*options, f"output={tmp_path / 'scores'}")
        assert not (tmp_path / "scores").exists()


def test_a_missing_harness_is_one_line(
    vision: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MetaVPTError, match=r"metavpt\[harness\]"):
        score("harness.tasks=[gsm8k]", *SMALL, *TARGETS, f"output={tmp_path / 'scores'}")
    with pytest.raises(MetaVPTError, match="language model"):
        score("harness.tasks=[gsm8k]", *PROBES, f"output={tmp_path / 'scores'}")


def test_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    options = [*SMALL, *TARGETS, "device=cpu", "problem.generator.batch_size=8"]
    trainer = finish(tmp_path / "run", *options, "strategy=fixed", "trainer.probe_every=0")
    export(tmp_path / "run", tmp_path / "exported")
    Path("tasks").mkdir()
    Path("sums.jsonl").write_text(
        "".join(f'{{"question": "{a} + 2 =", "label": {int(a == 5)}}}\n' for a in (1, 5))
    )
    Path("tasks/sums.yaml").write_text(TASK.format(file=Path("sums.jsonl").resolve()))
    harness = ["harness.tasks=[sums]", "harness.include_path=tasks"]
    for weights, more in (("run", []), ("exported", harness)):
        place = tmp_path / weights
        found = score(f"weights={weights}", *options, *more, f"output={place}-scores")
        assert found["metrics"] == trainer.metrics
        assert found["trivial"]["unigram"]["answers/nll"] > 0
        assert ("harness" in found) == bool(more)
        if more:
            assert found["harness"]["sums"]["acc,none"] in (0.0, 0.5, 1.0)
    model, tokenizer = metavpt.load("exported")  # type: ignore[misc]
    assert len(tokenizer) <= model.vocab_size
    with pytest.raises(MetaVPTError, match="export"):
        metavpt.load("run")
