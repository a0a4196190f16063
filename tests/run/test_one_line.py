"""Bad options of the commands: one line that names the key, status 2, and nothing is written."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from metavpt.cli.one_line_errors import options_first, run_command
from metavpt.compare import command as compare
from metavpt.run import command as run

CONF = str(Path(__file__).parents[2] / "examples" / "conf")
NOT_UTF8 = os.fsdecode(b"a\xff")
FROM = ("--config-dir", CONF)  # after the overrides, where Hydra itself refuses it
CHANNELS = {  # option -> what the line must contain
    "trainer.log_every=0": "trainer.log_every=0",
    "trainer.log_every=2.5": "trainer.log_every=2.5",
    "trainer.probe_every=often": "trainer.probe_every=often",
    "trainer.optimizer.lr=-1": "trainer.optimizer.lr",
    "trainer.optimizer.lr=fast": "trainer.optimizer",
    "trainer.optimizer=adam": "trainer.optimizer=adam",
    "strategy.optimizer.lr=-1": "strategy.optimizer.lr",
    "strategy.every=2.5": "strategy.every=2.5",
    "strategy.estimator=unrolled": "strategy.estimator=unrolled",
    "budget.steps=-3": "budget.steps=-3",
    "budget.steps=many": "budget.steps=many",
    "seed=1.5": "seed=1.5",
    "threads=0": "threads=0",
    "device=tpu": "device=tpu",
    "device=cuda:99": "device=cuda:99",
    "output=/proc/metavpt": "/proc/metavpt",
    f"output={'a' * 300}": "aaaa",
    f"output={NOT_UTF8}": "output=a",
    f"runs={NOT_UTF8}": "runs=a",
}
OTHERS = {
    "problem=dino_nyuv2 problem.batch_size=-4": "problem.batch_size=-4",
    "problem=dino_nyuv2 problem.batch_size=0": "problem.batch_size=0",
    "problem=dino_nyuv2 problem.batch_size=2.5": "problem.batch_size=2.5",
    "problem=lm_gsm8k problem.batch_size=100000000000": "problem.batch_size=100000000000",
    "problem=dino_nyuv2 problem.probe_heads=ridge": "problem.probe_heads=ridge",
    "problem=lm_gsm8k data.test=gsm8k": "data.test=gsm8k",
    "problem=lm_gsm8k ~data.test": "test",
}
COMPARISONS = {
    "strategies=fixed": "strategies=fixed",
    "seeds=3": "seeds=3",
    "seeds=[0,0.5]": "seeds=[0, 0.5]",
    "vary=widths": "vary=widths",
    "+vary.seed=3": "vary.seed=3",
    "trainer.log_every=2.5": "trainer.log_every=2.5",
}

Line = Callable[..., str]


@pytest.fixture
def one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Line:
    """Run a command in an empty folder, where it leaves no run; return its only line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def line(main: Callable[[], object], *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["metavpt", *options])
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        assert ended.value.code == 2
        (found,) = capsys.readouterr().err.splitlines()
        assert not list(tmp_path.glob("*/*"))  # at most the folder of runs, empty
        assert not [path for path in tmp_path.iterdir() if path.name != "runs"]
        return found

    return line


@pytest.mark.parametrize(("option", "words"), CHANNELS.items())
def test_a_run_with_a_bad_option(one_line: Line, option: str, words: str) -> None:
    assert words in one_line(run.main, "problem=channels", "budget.steps=2", option, *FROM)


@pytest.mark.parametrize(("options", "words"), OTHERS.items())
def test_a_shipped_problem_with_a_bad_option(one_line: Line, options: str, words: str) -> None:
    assert words in one_line(run.main, *options.split())


@pytest.mark.parametrize(("option", "words"), COMPARISONS.items())
def test_a_comparison_with_a_bad_option(one_line: Line, option: str, words: str) -> None:
    assert words in one_line(compare.main, "problem=channels", "budget.steps=2", option, *FROM)


def test_options_of_hydra_move_before_the_overrides_with_their_values() -> None:
    given = ["a=1", "--config-dir", "conf", "b=2", "-m", "--cfg", "job", "~c"]
    assert options_first(given) == [
        "--config-dir",
        "conf",
        "-m",
        "--cfg",
        "job",
        "a=1",
        "b=2",
        "~c",
    ]
