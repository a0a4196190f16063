"""What is printed of a run that is only planned: full size, no files, nothing written."""

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hydra import compose, initialize_config_module
from hydra.errors import InstantiationException
from rich.console import Console
from torch import Tensor, nn

from metavpt.cli.one_line_errors import run_command
from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.learners.vit import create_backbone
from metavpt.run import command, dry_run
from metavpt.training.build import build

# The table of hyper-parameters of V-Pretraining (arXiv 2601.22108): lr, batch, meta every, meta SSL
# batch, aligned blocks, designer,
# designer lr, keep, sparsity, total variation, weight of segmentation, of depth (ADE20K's labels
# have none)
PAPER = {
    "paper_ade20k_vitb": (4.15e-6, 256, 4, 32, 2, "UNet", 1.54e-4, 0.6, 0.131, 0.144, 1, 0),
    "paper_ade20k_vitl": (4.50e-5, 50, 4, 16, 4, "UNet", 2.17e-4, 0.5, 0.196, 0.0399, 4, 0),
    "paper_nyuv2_vitb": (
        8.58e-6,
        256,
        8,
        64,
        3,
        "PatchTransformer",
        2.21e-4,
        0.4,
        0.111,
        0.0417,
        16,
        2,
    ),
    "paper_nyuv2_vitl": (1.94e-6, 50, 2, 32, 4, "UNet", 8.03e-4, 0.4, 0.401, 0.159, 32, 16),
}


REPRODUCE = Path(__file__).parents[2] / "docs" / "reproduce.md"
# Parameters of the released models, as the hub counts them.
QWEN = {
    "paper_lm_qwen15_05b": 463_987_712,
    "paper_lm_qwen15_18b": 1_836_828_672,
    "paper_lm_qwen15_4b": 3_950_369_280,
    "paper_lm_qwen15_7b": 7_721_324_544,
    "paper_lm_qwen25_05b": 494_032_768,
}


def composed(*overrides: str) -> Any:
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        return compose("run", [*overrides, "trainer.dry_run=true"])


def printed(cfg: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    command.describe(cfg, console)
    return console.export_text()


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_rows_hold_its_figures(name: str) -> None:
    cfg = composed(f"experiment={name}")
    designer, feedback, strategy = cfg.designer, cfg.feedback, cfg.strategy
    assert PAPER[name] == (
        cfg.trainer.optimizer.lr, cfg.problem.batch_size, strategy.every,
        cfg.problem.meta_batch_size, cfg.backbone.tail_blocks,
        designer.network._target_.rpartition(".")[2], strategy.optimizer.lr, designer.keep,
        designer.sparsity_weight, designer.tv_weight,
        feedback.segmentation_weight, feedback.depth_weight,
    )  # fmt: skip
    assert (
        cfg.budget.steps,
        cfg.problem.num_prototypes,
        cfg.recipe.global_size,
        cfg.recipe.num_local,
    ) == (20000, 8192, 224, 6)
    assert cfg.data.path == (
        "ADEChallengeData2016" if "ade20k" in name else "nyu_depth_v2_labeled.mat"
    )  # no path would mean rooms
    assert strategy.estimator.direction._target_.endswith(".Dot")
    assert cfg.problem.probe_heads.linear_bn._target_.endswith(".LinearBN")
    assert set(cfg.problem.probes) == {"imagenet", "roxford", "rparis"}


@pytest.mark.parametrize("name", [*PAPER, "paper_ijepa_vith", *QWEN])
def test_a_row_of_the_paper_costs_what_the_docs_state(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Adapters are B A with rank 8 on every projection; the released weights are frozen."""
    monkeypatch.chdir(tmp_path)
    cfg = composed(f"experiment={name}")
    text = printed(cfg)
    assert not list(tmp_path.iterdir())

    def found(pattern: str) -> str:
        return re.findall(pattern, text)[0]

    total, frozen = number(found(r"learner +([\d,]+)")), 0
    if name in QWEN:
        frozen, shape = QWEN[name], cfg.learner.architecture
        width, middle = shape.hidden_size, shape.intermediate_size
        keys = width * shape.num_key_value_heads // shape.num_attention_heads
        sizes = [(width, out) for out in (width, keys, keys, width, middle, middle, middle)]
        adapters = 8 * sum(a + b for a, b in sizes)
        assert number(found(r"  frozen +([\d,]+)")) == frozen
        assert number(found(r"  aligned \(S\) +([\d,]+)")) == 2 * adapters
        assert total == frozen + shape.num_hidden_layers * adapters
    memory, flops = found(r"together +([\d.]+ GiB)"), found(r"forward passes: ([\d.e+]+)")
    updates = found(r"on, ([\d,]+) in all, learning")
    assert float(memory.split()[0]) < 0.95 * 80e9 / 2**30
    row = next(
        line for line in REPRODUCE.read_text().splitlines() if line.startswith(f"| `{name}`")
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")][1:-1]
    size, parts = cfg.problem.batch_size, cfg.trainer.accumulate
    trained = f"{total:,}, {total - frozen:,}"
    assert cells == [trained, f"{size}, {parts}", updates, memory, flops]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_a_row_that_trains_all_weights_is_planned() -> None:
    """Weights, gradients and two moments, 4 bytes each."""
    text = printed(composed("experiment=[paper_lm_qwen25_05b,paper/all_weights]"))
    gib = 4 * QWEN["paper_lm_qwen25_05b"] / 2**30
    for name, count in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
        assert re.search(rf"learner: {name} +{count * gib:.2f} GiB", text)
    assert "forward and backward passes a step: 32, 64,000 in all" in text
    memory = re.findall(r"together +([\d.]+ GiB)", text)[0]
    assert f"{memory} (Qwen2.5 0.5B)" in REPRODUCE.read_text()


@pytest.mark.parametrize("option", ["designer=policy", "strategy=unrolled"])
def test_a_hypergradient_that_cannot_be_planned_is_left_out(option: str) -> None:
    assert re.search(r"hypergradient, meta batch 16 +not counted", printed(composed(
        "problem=dino_masks", option
    )))  # fmt: skip


@pytest.mark.parametrize(
    "name", ["hf learner.source=owner/name", "smollm2_135m", "tiny_lm data=text data.path=x"]
)
def test_any_language_model_with_an_architecture_can_be_planned(name: str) -> None:
    cfg = composed("problem=lm_gsm8k", *f"learner={name}".split())
    if name.startswith("hf"):
        with pytest.raises(InstantiationException, match=r"learner\.architecture"):
            printed(cfg)
    else:
        assert "together" in printed(cfg)


def test_full_size_without_data_weights_or_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ViT-B with DINO's head and the patchwise designer: parameter counts follow from widths."""
    monkeypatch.chdir(tmp_path)
    asked: list[bool] = []
    create_model = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda *args, **options: (
            asked.append(options["pretrained"]) or create_model(*args, **options)
        ),
    )
    text = printed(composed("experiment=paper_nyuv2_vitb"))
    assert asked == [False]
    width, hidden, bottleneck, prototypes = 768, 2048, 256, 8192
    head = (
        (width + 1) * hidden
        + (hidden + 1) * hidden
        + (hidden + 1) * bottleneck
        + prototypes * bottleneck
    )
    block = (
        3 * width * width
        + (width + 1) * width
        + 2 * (4 * width * width)
        + 5 * width
        + 4 * width
        + 2 * width
    )
    tail = 3 * block + 2 * width
    assert re.search(rf"  head +{head:,}\b", text)
    assert re.search(rf"  aligned \(S\) +{tail:,}\b", text)
    assert re.search(r"learner: weights +358\.71 MiB", text)  # 94,034,176 parameters of 4 bytes
    assert "2,375 in all, learning rate 0.000221" in text  # steps 1000, 1008, ... 19992
    assert re.search(r"\n 0 +0 +5e-07\b", text)  # head warm-up: the backbone rests
    assert re.search(r"\n 10,000 +4\.29e-06", text)  # half of the peak in the middle of the cosine
    assert not list(tmp_path.iterdir())


def test_activations_are_those_of_the_real_loss(tmp_path: Path) -> None:
    """Of four images on the CPU, against what two make it expect on the meta device."""
    cfg = composed(
        "problem=dino_masks",
        f"data.rooms.folder={tmp_path}",
        "data.rooms.num_frames=8",
        "data.num_train=2",
        "data.num_meta=1",
    )
    with torch.device("meta"):
        planned = build(dry_run.without_files(cfg), tmp_path, Console(quiet=True)).problem
    cfg.problem.batch_size = 4
    problem = build(cfg, tmp_path, Console(quiet=True)).problem
    with torch.no_grad():
        task = problem.recipe(next(iter(problem.pretrain_batches(0))))
    kept = [
        tensor for name in ("learner", "teacher") for tensor in getattr(problem, name).parameters()
    ]
    real = dry_run.saved(
        lambda: problem.pretrain_loss(params.named(problem.learner), task), kept
    ).saved
    assert dry_run.learner_activations(planned, 4).saved == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        ["problem=ijepa_dense"],
        ["problem=mae_nyuv2", "strategy=fixed"],
        ["problem=dino_ade20k", "budget.steps=null", "budget.seconds=60"],
    ],
)
def test_every_dense_problem_can_be_planned(options: list[str]) -> None:
    text = printed(composed(*options))
    assert "activations" in text
    assert ("follows the share" in text) == ("budget.steps=null" in options)
    assert ("designer: an update every" in text) == (options == ["problem=ijepa_dense"])


def test_a_problem_without_the_groups_is_refused() -> None:
    with pytest.raises(MetaVPTError, match="backbone or learner"):
        printed(composed("problem=toy_sources"))


def test_a_planned_run_is_not_trained() -> None:
    with torch.device("meta"):
        trainer = build(
            dry_run.without_files(composed("problem=dino_masks")), Path("runs"), Console(quiet=True)
        )
    with pytest.raises(MetaVPTError, match="dry_run"):
        trainer.run()


def test_the_command_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", "experiment=paper_ijepa_vith", "trainer.dry_run=true"])
    run_command(command.main)
    assert "activations" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


TINY: dict[str, Any] = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 4,
    "patch_size": 8,
    "img_size": 64,
}


def total(features: Any) -> Tensor:
    return features.cls.square().sum() + features.patches.square().sum()


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch14_dinov2"])
def test_saved_bytes_on_meta_are_those_of_fused_attention_on_the_cpu(name: str) -> None:
    real = create_backbone(name, 1, **TINY)
    with torch.device("meta"):
        planned = create_backbone(name, 1, **TINY)
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total(real(torch.randn(2, 3, 64, 64)))
    with torch.device("meta"):
        counted = dry_run.saved(
            lambda: total(planned(torch.empty(2, 3, 64, 64))), planned.parameters()
        ).saved
    expected = sum(storage.nbytes() for storage in held.values())
    assert counted == pytest.approx(
        expected, rel=0.01
    )  # torch saves a few numbers for the random state of attention


def test_saved_bytes_of_a_known_graph() -> None:
    """exp keeps its result, a linear layer its input; a weight is in memory anyway."""
    with torch.device("meta"):
        layer = nn.Linear(8, 3, bias=False)
        x = torch.empty(5, 8, requires_grad=True)
        assert dry_run.saved(lambda: layer(x.exp()), layer.parameters()).saved == 4 * 5 * 8
        assert dry_run.saved(lambda: layer(x.exp()), []).saved == 4 * (5 * 8 + 8 * 3)


def test_saved_bytes_in_half_precision() -> None:
    """As autocast on CUDA: a linear layer in bfloat16, its weight cast once, a norm in float32.

    The layer keeps its input in 2 bytes; the norm a float32 copy of it, which the residual made,
    and two numbers for each row.
    """
    with torch.device("meta"):
        layer, norm = nn.Linear(8, 8, bias=False), nn.LayerNorm(8)
        x = torch.empty(5, 8, requires_grad=True)

        def loss() -> Tensor:
            return layer(norm(x + layer(x)))

        found = dry_run.saved(loss, [x, *layer.parameters(), *norm.parameters()], torch.bfloat16)
    assert found.copies == 2 * 8 * 8
    assert found.saved == 2 * (5 * 8) + 4 * (5 * 8 + 2 * 5) + 2 * (5 * 8)


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (torch.optim.AdamW, 2),
        (torch.optim.SGD, 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
    ],
)
def test_state_bytes(optimizer: Any, copies: int) -> None:
    layer = nn.Linear(100, 100, bias=False, device="meta")
    made = optimizer(layer.parameters())
    assert dry_run.state_bytes(made) == pytest.approx(copies * 40000, abs=8)
    assert layer.weight.grad is None
