"""Tokenizers: of a released model, or a small byte-level BPE trained on the sample."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from metavpt.data.cache import cache_folder
from metavpt.errors import MetaVPTError, reading

EOS, PAD = "<|endoftext|>", "<|pad|>"
NUM_BYTES = 256


def load_tokenizer(name: str | Path) -> Any:
    """The fast tokenizer of a hub name, a local folder or a GGUF file.

    One without EOS is an error: nothing would end a document.
    """
    transformers = _transformers()
    path = Path(name)
    source = {"pretrained_model_name_or_path": str(name)}
    if path.suffix == ".gguf":
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        if not path.is_file():
            raise MetaVPTError(f"{name}: no such file; check the path")
    with reading(
        f"{name}: no tokenizer can be read from it", "check the name, or get the files again"
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            **source, trust_remote_code=False
        )  # None would ask, and wait
    if not tokenizer.is_fast:
        raise MetaVPTError(
            f"{name}: its tokenizer gives no offsets, which tell prompt from answer; use a model "
            "with a fast tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise MetaVPTError(
            f"{name}: its tokenizer has no EOS token, which ends every document; set eos_token in "
            "its configuration"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path | None = None) -> Any:
    """Train a byte-level BPE on `texts`, with EOS and padding and one token per digit.

    It is trained on first use and stored. The stored name depends on the texts, so other texts
    train another one.

    Args:
        texts: The texts.
        vocab_size: The size of the vocabulary.
        folder: Where it is stored. Default: METAVPT_CACHE, else ~/.cache/metavpt.
    """
    texts = list(texts)
    if vocab_size < NUM_BYTES + 2:
        raise MetaVPTError(
            f"tokenizer: vocab_size={vocab_size} must be {NUM_BYTES + 2} or more: the bytes, EOS "
            "and padding"
        )
    if not any(texts):
        raise MetaVPTError("tokenizer: there is no text to train it on")
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(hashlib.blake2b(text.encode()).digest())
    folder = cache_folder(folder)
    path = folder / f"bpe-{vocab_size}-{digest.hexdigest()}"
    if not path.exists():
        _write(path, texts, vocab_size)
    return load_tokenizer(path)


def _write(path: Path, texts: list[str], vocab_size: int) -> None:
    partial = path.with_suffix(
        f".{os.getpid()}.partial"
    )  # of this process: two runs may train the same one at once
    tokenizer = _transformers().PreTrainedTokenizerFast(
        tokenizer_object=_train(texts, vocab_size),
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    try:
        tokenizer.save_pretrained(partial)
        with suppress(OSError):  # the other run was first, and wrote the same
            partial.rename(path)
    except OSError as error:
        raise MetaVPTError(
            f"{path.parent}: the tokenizer cannot be written ({error}); set METAVPT_CACHE"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not path.exists():
        raise MetaVPTError(f"{path}: the tokenizer cannot be written; set METAVPT_CACHE")


def _train(texts: list[str], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[attr-defined]
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[attr-defined]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise MetaVPTError(
            "language problems need the package transformers: pip install 'metavpt[language]'"
        ) from None
    return transformers
