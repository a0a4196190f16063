"""`make demo`: its comparison composes, runs at a small size, and prints both rows and step 0."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import command_process
from hydra import compose, initialize_config_module

from metavpt.compare import command, results

MAKEFILE = Path(__file__).parents[2] / "Makefile"
SMALL = [
    "backbone=vit_tiny_dinov3", "backbone.tail_blocks=1", "backbone.embed_dim=24",
    "backbone.depth=2", "backbone.num_heads=2",
    "data.rooms={num_frames: 40, size: [32, 48], seed: 0, folder: null}", "data.num_train=16",
    "data.num_meta=8",
    "problem.feature_size=[32, 48]", "problem.batch_size=4", "designer.hidden_width=8", "seeds=[0]",
    "strategy.phi_steps=3", "strategy.every=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def options() -> list[str]:
    """What the target gives to `metavpt.compare`."""
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", MAKEFILE.read_text(), flags=re.M)
    assert recipe
    words = shlex.split(recipe[1].replace("\\\n", " "))
    assert words[:3] == ["$(BIN)/python", "-m", "metavpt.compare"]
    return words[3:]


def test_its_rows_differ_in_their_strategy_alone(options: list[str]) -> None:
    with initialize_config_module("metavpt.configs", version_base="1.3"):
        cfg = compose("compare", options)
        made = {name: compose("compare", [*options, *row]) for name, row in command.rows(cfg)}
    assert {name: row.strategy._target_ for name, row in made.items()} == {
        "fixed": "metavpt.strategies.fixed.Fixed",
        "functional": "metavpt.strategies.function_space.Functional",
    }
    fixed, steered = (
        {key: value for key, value in row.items() if key != "strategy"} for row in made.values()
    )
    assert fixed == steered
    assert cfg.data.path is None


def test_it_runs_in_small_and_prints_both_rows(options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    small = [
        *SMALL,
        f"data.rooms.folder={tmp_path}",
        "budget.steps=3",
        "jobs=1",
        "threads=1",
        f"output={folder}",
    ]
    done = command_process.run(tmp_path, *options, *small, module="compare", seconds=300)
    assert done.returncode == 0, done.stderr
    found = {result.row: result for result in results.read(folder)}
    assert found.keys() == {"fixed", "functional"}
    assert found["fixed"].step0 == found["functional"].step0
    assert found["fixed"].metrics != found["functional"].metrics
    # beside the three steps, a replay batch before the first and before the third
    assert found["functional"].grad_evals > 3
    assert "ridge/depth_rmse" in done.stdout
    assert re.search(r"^functional\s+[\d.]+\s+[−+]?[\d.]+", done.stdout, flags=re.M)
    assert (folder / "report.html").is_file()
