"""Reports written anew from the folders of runs and comparisons."""

import gzip
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import example_folders as example
from helpers.damaged import MIB, growth

from metavpt.errors import MetaVPTError
from metavpt.report import command
from metavpt.report.comparison import write_comparison_report
from metavpt.training.streams import time_limit


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    folder = tmp_path / "made" / "comparison"
    return example.write_comparison(folder, ("fixed", "one_step"), figures=False)


def test_write_gives_the_report_of_run_folders_from_their_archive(
    comparison: Path, tmp_path: Path
) -> None:
    expected = write_comparison_report(comparison).read_text()
    kept = tmp_path / "kept" / "comparison"
    kept.mkdir(parents=True)
    with tarfile.open(kept / command.LOGS, "w:gz") as archive:
        for path in sorted(comparison.glob("**/seed*/*")):
            if path.name in ("metrics.jsonl", "config.yaml"):
                archive.add(path, path.relative_to(comparison))
    for name in ("rows.jsonl", "config.yaml", "environment.json"):
        shutil.copy(comparison / name, kept)
    report = command.write(kept)
    assert report == kept / "report.html"
    assert report.read_text() == expected
    assert not (kept / "rows").exists()


def test_write_names_a_damaged_archive(comparison: Path) -> None:
    (comparison / command.LOGS).write_bytes(b"no archive")
    with pytest.raises(MetaVPTError, match=command.LOGS):
        command.write(comparison)


@pytest.mark.parametrize(
    "name", ["../../../escaped", "/tmp/escaped", "rows/../seed0/metrics.jsonl", "rows.jsonl"]
)
def test_write_refuses_an_archive_of_anything_but_logs(comparison: Path, name: str) -> None:
    with tarfile.open(comparison / command.LOGS, "w:gz") as archive:
        member = archive.gettarinfo(comparison / "config.yaml")
        member.name = name
        archive.addfile(member, (comparison / "config.yaml").open("rb"))
    before = sorted(comparison.parent.rglob("*"))
    with pytest.raises(MetaVPTError, match="is not the log of a row"):
        command.write(comparison)
    assert sorted(comparison.parent.rglob("*")) == before


def test_write_refuses_an_archive_that_unpacks_without_end(
    comparison: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "MAX_BYTES", 1000)
    (comparison / "zeros").write_bytes(bytes(2000))
    with tarfile.open(comparison / command.LOGS, "w:gz") as archive:
        archive.add(comparison / "zeros", "rows/fixed/seed0/metrics.jsonl")
    with pytest.raises(MetaVPTError, match=r"1,000 bytes"):
        command.write(comparison)


def long_name(size: int) -> Iterator[bytes]:
    """A header that asks for the name of a member, which the reader holds in memory."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, size
    yield member.tobuf(tarfile.GNU_FORMAT)
    yield from (bytes(MIB) for _ in range(size // MIB))


def long_log(size: int) -> Iterator[bytes]:
    member = tarfile.TarInfo("rows/fixed/seed0/metrics.jsonl")
    member.size = size
    yield member.tobuf(tarfile.GNU_FORMAT)
    yield from (b" " * MIB for _ in range(size // MIB))


@pytest.mark.parametrize("parts", [long_name, long_log])
def test_an_archive_that_unpacks_to_far_more_than_it_holds_is_refused(
    comparison: Path, parts: Callable[[int], Iterator[bytes]]
) -> None:
    with gzip.open(comparison / command.LOGS, "wb", compresslevel=1) as file:
        file.writelines(parts(300 * MIB))
    assert (comparison / command.LOGS).stat().st_size < 3 * MIB

    def call() -> None:
        with pytest.raises(MetaVPTError, match=command.LOGS):
            command.write(comparison)

    assert growth(call) < 64 * MIB


@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gz", "plain"])
def test_an_archive_with_a_negative_size_ends(
    comparison: Path, pack: Callable[[bytes], bytes]
) -> None:
    member = tarfile.TarInfo("rows/fixed/seed0/metrics.jsonl")
    member.size = -512  # the next member would begin where this one does
    data = pack(member.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    (comparison / command.LOGS).write_bytes(data)
    with pytest.raises(MetaVPTError, match=command.LOGS), time_limit(60, "HANGS"):
        command.write(comparison)


def test_main_reports_runs_and_comparisons(
    comparison: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = next((comparison / "rows" / "fixed").iterdir())
    monkeypatch.setattr(sys, "argv", ["metavpt.report", str(comparison), str(run)])
    command.main()
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert written == [comparison / "report.html", run / "report.html"]
    assert all(path.is_file() for path in written)


def test_main_ends_with_one_line_where_there_is_nothing_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["metavpt.report", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert str(tmp_path) in " ".join(capsys.readouterr().err.split()).replace(" ", "")
