"""The folder of a run: its own, and of one process at a time."""

import os
import subprocess
import sys

import pytest

from metavpt.errors import MetaVPTError
from metavpt.training import run_folder

HOLD = """
import sys, time
from pathlib import Path
from metavpt.training import run_folder
run_folder.lock(Path(sys.argv[1]))
print("locked", flush=True)
if len(sys.argv) > 2:
    import os
    if os.fork() == 0:
        print("forked", os.getpid(), flush=True)
        time.sleep(60)
time.sleep(60)
"""


def holder(folder, *arguments):
    """Another process that holds the lock on `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *arguments], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    return process


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_until_the_first_has_died(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(MetaVPTError, match=f"this folder .process {process.pid} on"):
            run_folder.lock(tmp_path)
        with pytest.raises(MetaVPTError, match="at work in this folder"):
            run_folder.create(tmp_path, tmp_path, "run")
    finally:
        end(process)
    run_folder.lock(tmp_path)
    run_folder.unlock(tmp_path)


def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_run(tmp_path):
    process = holder(tmp_path, "fork")
    worker = int(process.stdout.readline().split()[1])
    try:
        end(process)
        run_folder.lock(tmp_path)
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    finally:
        os.kill(worker, 9)
        run_folder.unlock(tmp_path)


def test_a_folder_with_content_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MetaVPTError, match="not empty"):
        run_folder.create(tmp_path, tmp_path, "run")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 3000])
def test_a_name_that_is_too_long_is_one_line(tmp_path, name):
    with pytest.raises(MetaVPTError, match=r"cannot be written \(File name too long"):
        run_folder.create(tmp_path / name, tmp_path, "run")
    with pytest.raises(MetaVPTError, match="too long"):
        run_folder.create(None, tmp_path / name, "run")


@pytest.mark.parametrize("name", ["file", "file/below", "dangling"])
def test_a_place_that_cannot_be_a_folder_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "below")
    with pytest.raises(MetaVPTError, match=f"{name}: cannot be written"):
        run_folder.create(tmp_path / name, tmp_path, "run")
    with pytest.raises(MetaVPTError, match="cannot be written"):
        run_folder.create(None, tmp_path / name, "run")


def test_a_read_only_place_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(MetaVPTError, match=r"x: cannot be written \(Permission denied\)"):
        run_folder.create(tmp_path / "x", tmp_path, "run")


def test_remove_empties_the_target_of_a_link_and_keeps_the_link(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    folder = run_folder.create(tmp_path / "link", tmp_path, "run")
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text("")
    run_folder.remove(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]
    assert list((tmp_path / "target").iterdir()) == []
    run_folder.remove(folder)
    run_folder.remove(tmp_path / "never made")


def test_a_name_that_is_not_utf8_is_refused_before_anything_is_made(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xff")
    for folder, parent in ((path, tmp_path), (None, path)):
        with pytest.raises(MetaVPTError, match="not a UTF-8 name"):
            run_folder.create(folder, parent, "run")
    assert not list(tmp_path.iterdir())


def test_find_names_what_differs_and_lets_the_budget_change(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    config = "seed: 0\nproblem:\n  sizes: [1, 2]\nbudget:\n  steps: 4\n"
    (folder / "config.yaml").write_text(config)
    longer = config.replace("steps: 4", "steps: 9")
    try:
        for one in (folder, None):
            assert run_folder.find(one, tmp_path, config) == folder
            assert run_folder.find(one, tmp_path, longer, may_change=["budget"]) == folder
            with pytest.raises(MetaVPTError, match=r"budget\.steps=4, now 9"):
                run_folder.find(one, tmp_path, longer)
            other = longer.replace("[1, 2]", "[1, 3]").replace("seed: 0", "seed: 1")
            with pytest.raises(MetaVPTError, match=r"seed=0, now 1; problem\.sizes\.1=2, now 3"):
                run_folder.find(one, tmp_path, other, may_change=["budget"])
    finally:
        run_folder.unlock(folder)
    (folder / "config.yaml").write_text("seed: [")
    with pytest.raises(MetaVPTError, match=r"config\.yaml: not a readable configuration"):
        run_folder.find(folder, tmp_path, config)
    with pytest.raises(MetaVPTError, match=r"config\.yaml is missing"):
        run_folder.find(tmp_path, tmp_path, config)
