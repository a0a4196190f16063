"""`make demo-language`: its comparison composes, runs at a small size, and shows its texts."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import command_process
from helpers.html_page import Page
from hydra import compose, initialize_config_module

from metavpt.compare import command, results
from metavpt.report.rows import run_folder
from metavpt.report.texts import read_texts

MAKEFILE = Path(__file__).parents[2] / "Makefile"
TARGETS = {  # what each row trains on
    "fixed": "metavpt.strategies.fixed.Fixed",
    "random_feedback": "metavpt.strategies.learned.Learned",
    "uniform": "metavpt.strategies.controls.Softened",
    "greedy": "metavpt.strategies.tilted_targets.Tilt",
    "self_distillation": "metavpt.strategies.controls.Softened",
    "one_step_linear": "metavpt.strategies.learned.Learned",
    "tilt": "metavpt.strategies.tilted_targets.Tilt",
    "labels_only": "metavpt.strategies.controls.LabelsOnly",
    "direct": "metavpt.strategies.controls.Direct",
}
SMALL = [
    "learner.vocab_size=400", "learner.hidden_size=16", "learner.intermediate_size=24",
    "learner.num_attention_heads=2",
    "designer.width=8", "designer.num_layers=1", "designer.num_heads=2",
    "designer.num_candidates=6", "data.num_test=4",
    "data.num_general=3", "problem.generator.max_new_tokens=4", "problem.feedback_batch_size=4",
    "trainer.first_order_every=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def options() -> list[str]:
    """What the target gives to `metavpt.compare`."""
    recipe = re.search(r"^demo-language:.*\n((?:\t.*\n)+)", MAKEFILE.read_text(), flags=re.M)
    assert recipe
    words = shlex.split(recipe[1].replace("\\\n", " "))
    assert words[:3] == ["$(BIN)/python", "-m", "metavpt.compare"]
    return words[3:]


def test_its_rows_are_step_0_plain_the_designer_tilt_and_the_controls(options: list[str]) -> None:
    own = [
        option for option in options if not option.startswith("strategy.")
    ]  # those hold for the rows that have them
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("compare", own)
        assert cfg.warm_start > 0
        assert {
            name: compose("compare", [*own, *row]).strategy._target_
            for name, row in command.rows(cfg)
        } == TARGETS


def test_it_runs_in_small_and_reports_answers_and_targets(
    options: list[str], tmp_path: Path
) -> None:
    folder, less = (
        tmp_path / "comparison",
        ["strategies=[one_step_linear,tilt]", "controls=[fixed]", "warm_start=1", "budget.steps=2"],
    )
    small = [*options, *SMALL, *less, "jobs=1", "threads=1", f"output={folder}"]
    done = command_process.run(tmp_path, *small, module="compare", seconds=300)
    assert done.returncode == 0, done.stderr
    found = {result.row: result for result in results.read(folder)}
    assert found.keys() == {"fixed", "one_step_linear", "tilt"}
    assert found["fixed"].step0 == found["one_step_linear"].step0
    assert found["fixed"].steered == [
        "answers/nll",
        "answers/pass@1_strict",
        "answers/pass@1_flexible",
    ]
    assert "step 0" in (folder / "table.md").read_text()
    for row in found:
        run = run_folder(folder, row, 0)
        texts, page = read_texts(run / "texts"), Page((run / "report.html").read_text())
        assert texts.steps == (0, 2)
        assert len(texts.answers) == 4
        assert all(answer.last for answer in texts.answers)
        assert texts.answers[0].first.question in page.text
        assert bool(texts.passages) == (
            row != "fixed"
        )  # plain next-token prediction has no choice to show
        assert any(
            name == "style" and "--gate" in str(value) for name, value in page.attributes
        ) == (row != "fixed")
