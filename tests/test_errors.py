import errno
from pathlib import Path

import pytest

from metavpt.errors import MetaVPTError, brief, check_known, reading, writing


def test_brief_is_one_short_line() -> None:
    assert brief(ValueError("a\n  b")) == "a b"
    assert brief(ValueError("a\n  b"), named=True) == "ValueError: a b"
    assert brief(ValueError()) == brief(ValueError(), named=True) == "ValueError"
    assert len(brief(ValueError("x" * 999))) == 200


def test_check_known_names_the_option_and_the_choices() -> None:
    check_known("b", "option", "a", "b")
    with pytest.raises(MetaVPTError, match=r"option=c: .*a, b"):
        check_known("c", "option", "a", "b")


@pytest.mark.parametrize("error", [ValueError("cut short"), OSError("cut short")])
def test_reading_turns_any_error_into_one_that_names_the_fault(error: Exception) -> None:
    with pytest.raises(MetaVPTError, match=r"file\.x: .*cut short"), reading("file.x: damaged"):
        raise error


def test_reading_leaves_errors_for_users_as_they_are() -> None:
    with pytest.raises(MetaVPTError, match=r"^mine$"), reading("file.x: damaged"):
        raise MetaVPTError("mine")


def test_writing_names_the_file_and_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(MetaVPTError, match=rf"{path}: .*No space"), writing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ValueError, match="other"), writing(path):
        raise ValueError("other")
