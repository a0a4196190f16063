"""What comes out of a run: the backbone of student or teacher, as other libraries read it."""

import json
import re
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from metavpt.cli.one_line_errors import run_command
from metavpt.errors import MetaVPTError
from metavpt.export import backbone
from metavpt.export import command as exporting
from metavpt.export.backbone import TIMM_NAMES
from metavpt.export.command import export
from metavpt.export.loading import Part
from metavpt.learners.projection import Learner, ProjectionHead
from metavpt.learners.teacher import Teacher
from metavpt.learners.vit import OWN_MODELS, Backbone, create_backbone
from metavpt.training.build import build
from metavpt.training.checkpoint import Checkpoints

DINOV2: dict[str, Any] = {
    "name": "vit_small_patch14_dinov2",
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "img_size": 28,
}
OWN: dict[str, Any] = {
    "name": "vit_tiny_dinov3",
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "init_values": 1.0,
}
METRICS = [
    {"ridge/depth_rmse": 1.25, "ridge/seg_miou": 0.125},
    {"ridge/depth_rmse": 1.0, "ridge/seg_miou": 0.25},
]


def random_learner(options: dict[str, Any], seed: int) -> Learner:
    torch.manual_seed(seed)
    learner = Learner(create_backbone(tail_blocks=1, **options), ProjectionHead(32, 8, 8, 4))
    for parameter in learner.parameters():
        nn.init.normal_(parameter, std=0.2)
    return learner.eval()


@pytest.fixture
def finished(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Backbone]]:
    """A run folder of the backbone that the test names, and what its student and teacher are."""
    options = getattr(request, "param", DINOV2)
    folder = tmp_path / "run"
    folder.mkdir()
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose(
            "run",
            [
                "problem=dino_masks",
                "strategy=one_step",
                "backbone=timm",
                f"backbone.name={options['name']}",
                "seed=7",
            ],
        )
    cfg = OmegaConf.merge(
        OmegaConf.to_container(cfg, resolve=True),
        {"backbone": options | {"pretrained": False, "tail_blocks": 1}},
    )
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (folder / "environment.json").write_text(
        json.dumps({"command": "python -m metavpt.run seed=7", "seed": 7, "torch": "2.14.0"})
    )
    probes = [
        {"kind": "probe", "step": 400 * i, "metrics": metrics} for i, metrics in enumerate(METRICS)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    student, teacher = random_learner(options, 0), random_learner(options, 1)
    state = {"learner": student.state_dict(), "teacher": Teacher(teacher).state_dict()}
    Checkpoints(folder / "checkpoints").save(400, {"problem": state})
    return folder, {"student": student.backbone, "teacher": teacher.backbone}


def assert_tokens_are(tokens: Tensor, backbone: Backbone, images: Tensor) -> None:
    features = backbone(images)
    patches = features.patches.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens[:, -patches.shape[1] :], patches, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, 0], features.cls, atol=1e-5, rtol=0)


@pytest.mark.parametrize("finished", [DINOV2, OWN], indirect=True, ids=["dinov2", "own"])
@pytest.mark.parametrize("part", ["student", "teacher"])
@torch.no_grad()
def test_each_library_gives_the_features_of_the_part(
    finished: Any, part: Part, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder, parts = finished
    to = export(folder, tmp_path / "out" / "weights", part)
    backbone = parts[part]
    images = torch.randn(2, 3, *backbone.trunk.patch_embed.img_size)

    from_folder: Any = timm.create_model(f"local-dir:{to / 'timm'}", pretrained=True).eval()
    assert_tokens_are(from_folder.forward_features(images), backbone, images)
    torch.testing.assert_close(from_folder(images), backbone(images).cls, atol=1e-5, rtol=0)
    made = json.loads((to / "timm" / "config.json").read_text())
    arguments = made["model_args"] | {
        "num_classes": 0,
        "checkpoint_path": to / "timm" / "model.safetensors",
    }
    from_file: Any = timm.create_model(made["architecture"], **arguments)
    assert_tokens_are(from_file.eval().forward_features(images), backbone, images)
    model = transformers.AutoModel.from_pretrained(to / "transformers").eval()
    assert_tokens_are(model(images).last_hidden_state, backbone, images)
    assert f"({part})" in (to / "README.md").read_text()


def test_a_run_from_its_own_trainer(tmp_path: Path) -> None:
    """The names in a checkpoint are those that the export looks for."""
    small = [
        "backbone.embed_dim=16",
        "backbone.depth=2",
        "backbone.num_heads=1",
        "backbone.tail_blocks=1",
    ]
    small += [
        "data.num_train=2",
        "data.num_meta=1",
        "data.rooms.num_frames=8",
        "problem.feature_size=[16,16]",
    ]
    options = [
        "problem=dino_masks",
        "strategy=fixed",
        "device=cpu",
        f"data.rooms.folder={tmp_path}",
        *small,
    ]
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", options)
    folder = tmp_path / "run"
    trainer = build(cfg, folder, Console(quiet=True))
    trainer.log.write("probe", 0, metrics=METRICS[0])
    trainer.save()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    problem: Any = trainer.problem
    parts: dict[Part, Any] = {"student": problem.learner, "teacher": problem.teacher.learner}
    for part, module in parts.items():
        to = export(folder, tmp_path / part, part, "timm")
        weights = load_file(to / "timm" / "model.safetensors")
        assert torch.equal(weights["norm.weight"], module.backbone.tail.norm.weight)
        assert torch.equal(
            weights["blocks.0.attn.qkv.weight"], module.backbone.trunk.blocks["0"].attn.qkv.weight
        )


def test_the_model_card_says_what_the_run_was(finished: Any, tmp_path: Path) -> None:
    card = (export(finished[0], tmp_path / "weights", "student", "timm") / "README.md").read_text()
    assert ModelCard(card).data.tags == ["feature-extraction", "self-supervised", "metavpt"]
    for line in (
        "| ridge/depth_rmse | 1.25 | 1 | −0.25 |",
        "| ridge/seg_miou | 0.125 | 0.25 | +0.125 |",
        "step 0 (before any training here) and at step 400",
        "- data: generated rooms, unlabelled images from frames",
        "- strategy: `metavpt.strategies.learned.Learned`",
        "- estimator: `OneStep`",
        "- budget: 400 steps; 400 steps taken",
        "- seed: 7",
        "python -m metavpt.run seed=7",
        "- torch: 2.14.0",
        "no released weights restrict them",
    ):
        assert line in card


def test_the_code_of_the_model_card_loads_the_model(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    folder, parts = finished
    to = export(folder, tmp_path / "weights", "student")
    monkeypatch.chdir(to)
    kernel = parts["student"].trunk.patch_embed.proj.weight
    libraries = set()
    for code in re.findall(r"```python\n(.*?)```", (to / "README.md").read_text(), flags=re.DOTALL):
        names: dict[str, Any] = {}
        exec(code, names)
        libraries.add(type(names["model"]).__module__.partition(".")[0])
        assert any(torch.equal(kernel, p) for p in names["model"].parameters())
    assert libraries == {"timm", "transformers", "metavpt"}


@pytest.mark.parametrize(
    ("backbone", "licence"),
    [
        (
            {"pretrained": True, "name": "vit_small_patch14_dinov2.lvd142m"},
            "apache-2.0",
        ),
        (
            {"weights": "facebook/dinov2-small"},
            "derive from `facebook/dinov2-small`; the licence of that file",
        ),
    ],
)
def test_the_licence_is_that_of_the_weights_it_began_with(
    finished: Any, backbone: dict[str, Any], licence: str, tmp_path: Path
) -> None:
    file = finished[0] / "config.yaml"
    file.write_text(
        OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.load(file), {"backbone": backbone}))
    )
    assert (
        licence
        in (export(finished[0], tmp_path / "weights", "teacher", "timm") / "README.md").read_text()
    )


def test_nothing_is_overwritten_and_nothing_half_written(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "exports"
    place.mkdir()
    to = export(finished[0], place / "weights", format="timm")
    before = (to / "README.md").read_text()
    with pytest.raises(MetaVPTError, match="is there already"):
        export(finished[0], to, "teacher", "timm")
    assert (to / "README.md").read_text() == before
    monkeypatch.setattr(
        exporting, "model_card", lambda *_: (_ for _ in ()).throw(RuntimeError("the disk is full"))
    )
    with pytest.raises(RuntimeError, match="disk is full"):
        export(finished[0], place / "other", format="timm")
    assert [path.name for path in place.iterdir()] == ["weights"]


def test_an_export_that_reads_back_otherwise_is_refused(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_weights(backbone: Backbone) -> dict[str, Tensor]:
        state = original(backbone)
        return state | {"norm.weight": state["norm.weight"] * 1.01}

    original = backbone.timm_state_dict
    monkeypatch.setattr(backbone, "timm_state_dict", other_weights)
    with pytest.raises(MetaVPTError, match=r"timm gives other features .*nothing was exported"):
        export(finished[0], tmp_path / "weights", format="timm")
    assert not (tmp_path / "weights").exists()


def test_what_cannot_be_exported(finished: Any, tmp_path: Path) -> None:
    folder, to = finished[0], tmp_path / "weights"
    with pytest.raises(MetaVPTError, match="format=onnx: known are timm, transformers, both"):
        export(folder, to, format="onnx")
    with pytest.raises(MetaVPTError, match="part=ema: known are student, teacher"):
        export(folder, to, part="ema")  # pyright: ignore[reportArgumentType]
    with pytest.raises(MetaVPTError, match=r"config\.yaml is missing"):
        export(tmp_path / "nowhere", to)
    Checkpoints(folder / "checkpoints").save(
        401, {"problem": {"learner": {"backbone.trunk.cls_token": torch.zeros(1, 1, 8)}}}
    )
    with pytest.raises(
        MetaVPTError, match=r"step-00000401\.pt does not fit the backbone in .*config\.yaml"
    ):
        export(folder, to, format="timm")
    with pytest.raises(
        MetaVPTError, match="part=teacher: the run has no teacher, its checkpoint holds learner"
    ):
        export(folder, to, "teacher", "timm")
    (folder / "config.yaml").write_text("backbone: null\n")
    with pytest.raises(MetaVPTError, match="names neither a backbone"):
        export(folder, to)
    assert not to.exists()


def test_every_model_of_our_own_has_its_architecture_in_timm() -> None:
    assert TIMM_NAMES.keys() == OWN_MODELS.keys()


class Hub:
    """Stands in for HfApi; `calls` are those of all its instances."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    fails = False

    def create_repo(self, name: str, **options: Any) -> str:
        self.calls.append(("create", name, options))
        return f"https://hub/{name}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.fails:
            raise OSError("403 Forbidden")
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, names))


def test_an_export_goes_to_the_hub(
    finished: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(exporting, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])

    def command(to: str, name: str, token: str | None = "secret") -> None:
        monkeypatch.setattr(exporting, "get_token", lambda: token)
        options = [f"run={finished[0]}", f"to={tmp_path / to}", "format=timm"]
        monkeypatch.setattr(sys, "argv", ["export", *options, f"push_to_hub={name}"])
        run_command(exporting.main)

    command("pushed", "ann/vit")
    assert Hub.calls == [
        ("create", "ann/vit", {"private": True, "exist_ok": True}),
        ("upload", "ann/vit", ["README.md", "config.yaml", "timm"]),
    ]
    assert "https://hub/ann/vit" in capsys.readouterr().out
    for to, name, token, words in (
        ("a", "ann/vit", None, "hf auth login"),
        ("b", "vit", "secret", "push_to_hub=vit: give owner/name"),
    ):
        with pytest.raises(SystemExit):
            command(to, name, token)
        assert words in capsys.readouterr().err
        assert not (tmp_path / to).exists()
    monkeypatch.setattr(Hub, "fails", True)
    with pytest.raises(SystemExit):
        command("c", "ann/vit")
    assert "403 Forbidden" in capsys.readouterr().err
    assert (tmp_path / "c" / "timm" / "model.safetensors").is_file()
    assert len(Hub.calls) == 3


def test_the_command(
    finished: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["export", f"run={finished[0]}", f"to={tmp_path / 'weights'}", "format=timm"]
    )
    run_command(exporting.main)
    assert (tmp_path / "weights" / "README.md").is_file()
    monkeypatch.setattr(sys, "argv", ["export", f"run={finished[0]}"])
    with pytest.raises(SystemExit) as exit_status:
        run_command(exporting.main)
    assert exit_status.value.code == 2
    assert "to" in capsys.readouterr().err
