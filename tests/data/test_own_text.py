"""A user's own text and answers: split, trained on and scored by NLL, refused in one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_language import TARGETS
from hydra import compose, initialize_config_module
from rich.console import Console

from metavpt.data.own_text import text_data
from metavpt.errors import MetaVPTError
from metavpt.training.build import build

SMALL = [
    "problem=lm", "data=text", "learner.vocab_size=300", "learner.tail_layers=1",
    "learner.hidden_size=16", "learner.intermediate_size=24", "learner.num_hidden_layers=2",
    "learner.num_attention_heads=2", "designer.width=8", "designer.num_layers=1",
    "designer.num_heads=2", "problem.length=64", "problem.batch_size=2",
    "problem.meta_batch_size=2", "problem.feedback_batch_size=3", "device=cpu",
]  # fmt: skip


def rows(*numbers: int, **more: str) -> str:
    made = ({"prompt": f"Who is number {n}?", "answer": f"A friend of {n + 1}."} for n in numbers)
    return "".join(json.dumps(row | more) + "\n" for row in made)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two text files and rows for the stream, and ten answers."""
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "mine"
    (root / "stream" / "deep").mkdir(parents=True)
    (root / "stream" / "a.txt").write_text("The sun rose.\nIt was red.\n\nThe moon set.\n")
    (root / "stream" / "deep" / "b.md").write_text("Snow fell all night.\n")
    (root / "stream" / "c.jsonl").write_text('{"text": "Rain fell."}\n' + rows(50))
    (root / "answers.jsonl").write_text(rows(*range(10)))
    return root


def questions(items: Any) -> set[str]:
    return {item.question for item in items}


def test_answers_are_split_and_files_become_documents(mine: Path) -> None:
    data = text_data(str(mine))
    documents = list(data.stream["text"].documents)
    assert [document.answer for document in documents] == [
        "The sun rose.\nIt was red.", "The moon set.", "Rain fell.", "A friend of 51.",
        "Snow fell all night.",
    ]  # fmt: skip
    assert [document.question for document in documents][3] == "Who is number 50?"
    parts = [questions(part["answers"]) for part in (data.feedback, data.held_out, data.test)]
    assert [len(part) for part in parts] == [7, 1, 2]
    assert len(set.union(*parts)) == 10
    assert data.test == text_data(str(mine)).test
    assert data.test != text_data(str(mine), seed=1).test


def test_places_fields_and_parts_of_ones_own(mine: Path) -> None:
    (mine / "t.jsonl").write_text('{"q": "Name?", "topic": "x", "a": "Ann."}\n')
    (mine / "f.jsonl").write_text('{"q": "Age?", "topic": "y", "a": "9."}\n' * 3)
    data = text_data(
        str(mine),
        stream=["stream/*.txt", "stream/deep"],
        answers="f.jsonl",
        test="t.jsonl",
        general="stream/deep/b.md",
        format={"question": ["topic", "q"], "answer": "a"},
        unit="line",
        num_feedback=2,
    )
    assert [d.answer for d in data.stream["text"].documents] == [
        "The sun rose.", "It was red.", "The moon set.", "Snow fell all night.",
    ]  # fmt: skip
    assert [(d.question, d.answer) for d in data.test["answers"]] == [("x\nName?", "Ann.")]
    assert (len(data.feedback["answers"]), len(data.held_out["answers"])) == (2, 1)
    assert [d.answer for d in data.general["general"]] == ["Snow fell all night."]


def test_what_does_not_fit_is_named(mine: Path) -> None:
    (mine / "bad.jsonl").write_text(rows(1) + '{"prompt": "Why?"}\n')
    (mine / "two.jsonl").write_text(rows(1, 2))
    (mine / "x.csv").write_text("a,b\n")
    for options, words in (
        ({"path": "/nowhere"}, "data.path=/nowhere"),
        ({"stream": "books"}, "data.stream=books"),
        ({"answers": "bad.jsonl"}, r"bad\.jsonl, line 2: no field 'answer'"),
        ({"answers": "two.jsonl"}, r"data\.answers=two\.jsonl: 2 examples are too few"),
        ({"answers": "stream/a.txt"}, r"a\.txt: data\.answers are rows"),
        ({"answers": "x.csv"}, r"x\.csv: must be one of"),
        ({"test": 1.5}, r"data\.test=1\.5"),
        ({"num_feedback": 8}, r"data\.answers=answers\.jsonl: has 8 examples"),
        ({"format": {"question": ["prompt"]}}, "data: format needs `answer`"),
    ):
        with pytest.raises(MetaVPTError, match=words):
            text_data(**{"path": str(mine), **options})


def test_answers_steer_and_are_scored_by_their_likelihood(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "stream" / "leak.txt").write_text("\n\n".join(f"Who is number {n}?" for n in range(10)))
    options = [*SMALL, *TARGETS, f"data.path={mine}", "strategy.every=1", "strategy.burn_in=0"]
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("run", [*options, "budget.steps=2", "trainer.first_order_every=0"])
    trainer = build(cfg, tmp_path / "run", Console(quiet=True))
    trainer.run()
    assert list(trainer.metrics) == ["answers/nll"]
    problem: Any = trainer.problem
    (batch,) = problem.answers["answers"].batches()
    with torch.no_grad():
        logits = problem.learner.logits(batch)[:, :-1].log_softmax(-1)
    nll = -logits.gather(-1, batch.tokens[:, 1:, None])[..., 0][batch.loss_mask[:, 1:]].mean()
    assert math.isclose(trainer.metrics["answers/nll"], float(nll), rel_tol=1e-5)
    assert problem.is_target_metric("answers/nll")
    assert problem.metric_directions == {"answers/nll": "lower"}
    assert [r for r in trainer.log.records() if r["kind"] == "designer"]
    assert "text: 10 of 15 documents nearly equal a question" in capsys.readouterr().err
