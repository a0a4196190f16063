"""Files that are written whole or not at all, and what cannot be written in one line."""

import errno
import os

import pytest

from metavpt.errors import MetaVPTError, writing
from metavpt.training.disk import replacing, write_text


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "config.yaml"
    write_text(path, "ä: 1\n")
    write_text(path, "ä: 2\n")
    assert path.read_text(encoding="utf-8") == "ä: 2\n"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path, error):
    with replacing(path) as file:
        file.write(b"ne")
        raise error


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path):
    path = tmp_path / "config.yaml"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        write_half(path, KeyboardInterrupt())
    with pytest.raises(MetaVPTError, match=r"config\.yaml: cannot be written .*resume=true"):
        write_half(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_without_permission_is_not_asked_for_more_room(tmp_path):
    with pytest.raises(MetaVPTError, match="Permission denied") as raised, writing(tmp_path):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert "room" not in str(raised.value)
