"""What comes out of a language run: a model folder of transformers, which other tools read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.harness_task import TASK
from helpers.small_language import SMALL
from helpers.tiny_lm import packed
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from metavpt import MetaVPTError
from metavpt.export.command import export
from metavpt.training.build import build

LORA = "learner.lora={_target_: metavpt.learners.pretrained_lm.LoRA, rank: 2}"


def finished(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """A run of no steps in `folder`; its learner, moved away from where it began."""
    monkeypatch.setenv("METAVPT_CACHE", str(folder.parent / "cache"))
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", [*SMALL, "strategy=fixed", "device=cpu", *options])
    trainer = build(cfg, folder, Console(quiet=True))
    problem: Any = trainer.problem
    with torch.no_grad():
        for p in problem.learner.parameters():
            p.add_(0.1 * torch.randn_like(p))
    trainer.log.write("probe", 0, metrics={"answers/nll": 2.0})
    trainer.save()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return problem.learner


@pytest.mark.parametrize("options", [[], [LORA]], ids=["full", "lora"])
def test_transformers_reads_the_model_and_its_tokenizer(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    learner = finished(tmp_path / "run", monkeypatch, *options)
    to = export(tmp_path / "run", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(to / "transformers")
    batch = packed([[12], [12]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(batch.tokens).logits, learner.logits(batch), atol=1e-4, rtol=1e-4
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(to / "transformers")
    assert tokenizer.decode(tokenizer("12 + 7 = 19").input_ids) == "12 + 7 = 19"
    card = (to / "README.md").read_text()
    for line in (
        "# from_scratch, continued by metavpt",
        "- data: sums, weight 0.9: Arithmetic",
        "AutoModelForCausalLM",
        "answers/nll",
    ):
        assert line in card


def test_the_evaluation_harness_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `lm_eval --model hf --model_args pretrained=<folder>/transformers --tasks ...` does."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    finished(tmp_path / "run", monkeypatch)
    model = export(tmp_path / "run", tmp_path / "out") / "transformers"
    tasks, file = tmp_path / "tasks", tmp_path / "sums.jsonl"
    tasks.mkdir()
    file.write_text(
        "".join(f'{{"question": "{a} + 2 =", "label": {int(a == 5)}}}\n' for a in (1, 5))
    )
    (tasks / "sums.yaml").write_text(TASK.format(file=file))
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "device": "cpu"},
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["sums"]["acc,none"] in (0.0, 0.5, 1.0)


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path / "run", monkeypatch)
    for options, message in (
        ({"part": "teacher"}, "has no teacher"),
        ({"format": "timm"}, "exported for transformers"),
    ):
        with pytest.raises(MetaVPTError, match=message):
            export(tmp_path / "run", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
