"""A small tokenizer for the tests of language data."""

from typing import Any

import pytest

from metavpt.data.arithmetic import Arithmetic
from metavpt.data.tokenizer import train_tokenizer
from metavpt.data.tokens import text_of


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    texts = map(text_of, Arithmetic("stream", {"gsm_symbolic": {}}, limit=100))
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"))
