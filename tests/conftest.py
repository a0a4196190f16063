"""Fixtures for the whole suite."""

import gc
import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills",
        type=int,
        default=3,
        help="random moments at which tests/training/test_faults.py kills a run",
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Collect garbage seldom, and never look through what importing and collecting made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data. Tests marked `shared_data` read it and are skipped without it."""
    folder = Path(
        os.environ.get("METAVPT_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data"
    )
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set METAVPT_SHARED_DATA")
    return folder
