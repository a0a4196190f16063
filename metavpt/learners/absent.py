"""Stand-ins for language models with their tokenizers, to plan a run without their files."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from metavpt.errors import MetaVPTError
from metavpt.learners.pretrained_lm import random_language_model
from metavpt.learners.tokenized import TokenizedModel

# in the place of a tokenizer: nothing is tokenised
SILENT = SimpleNamespace(eos_token_id=0, pad_token_id=0, name_or_path="absent")


def absent_model(
    texts: Iterable[str],
    architecture: Mapping[str, Any] | None = None,
    source: Any = None,
    tokenizer: Any = None,
    gguf_file: Any = None,
    dtype: Any = None,
    **options: Any,
) -> TokenizedModel:
    """As `released`, with random weights of `architecture`.

    Raises:
        MetaVPTError: The architecture is not stated.
    """
    if architecture is None:
        raise MetaVPTError(
            f"trainer.dry_run=true: {source} is not read; state its configuration, "
            "learner.architecture={model_type: qwen2, hidden_size: 896, ...}"
        )
    return TokenizedModel(random_language_model(**architecture, **options), SILENT)


def absent_from_scratch(
    texts: Iterable[str], vocab_size: int = 512, **model: Any
) -> TokenizedModel:
    """As `from_scratch`, with a vocabulary of the size that is asked for."""
    return TokenizedModel(random_language_model(vocab_size=vocab_size, **model), SILENT)
