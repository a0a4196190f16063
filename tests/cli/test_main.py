import runpy
import sys
from typing import Any

import pytest

from metavpt.cli import main as cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_main_runs_the_module_of_the_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, list[str], dict[str, Any]]] = []
    monkeypatch.setattr(
        runpy, "run_module", lambda name, **options: ran.append((name, list(sys.argv[1:]), options))
    )
    monkeypatch.setattr(sys, "argv", ["metavpt", command, "a=1"])
    cli.main()
    ((name, arguments, options),) = ran
    assert (name, arguments, options["run_name"]) == (f"metavpt.{command}", ["a=1"], "__main__")


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["nothing"], 2), (["--help"], 0)])
def test_main_lists_the_commands_otherwise(
    arguments: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["metavpt", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == status
    shown = capsys.readouterr().err
    assert all(command in shown for command in cli.COMMANDS)
