"""Damaged weights and models: a MetaVPTError that names the file, or a partial result."""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damaged import SPARE, Reader, assert_survives, growth_alone
from helpers.tiny_gguf import write_gguf
from helpers.tiny_lm import tiny_lm
from safetensors.torch import save_file

from metavpt.errors import MetaVPTError
from metavpt.learners.pretrained_lm import pretrained_language_model
from metavpt.learners.weights import _backbone, _read_file, _read_folder

STATE = {"patch_embed.proj.weight": torch.ones(2, 3), "norm.weight": torch.ones(3)}


def saved(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def tensors(folder: Path) -> bytes:
    save_file(STATE, folder / "x")
    return (folder / "x").read_bytes()


def index(folder: Path) -> bytes:
    save_file(STATE, folder / "a.safetensors")
    return (
        b'{"weight_map": '
        b'{"patch_embed.proj.weight": "a.safetensors", "norm.weight": "a.safetensors"}}'
    )


def language_model(folder: Path, name: str) -> bytes:
    tiny_lm().float().save(folder)
    return (folder / name).read_bytes()


def gguf(folder: Path) -> bytes:
    write_gguf(folder / "x", tiny_lm())
    return (folder / "x").read_bytes()


def read_folder(path: Path) -> None:
    pretrained_language_model(path.parent)


READERS = {
    "weights": Reader(
        "a.pt", lambda _: saved(STATE), lambda path: _backbone(_read_file(path), path)
    ),
    "safetensors": Reader("a.safetensors", tensors, lambda path: _backbone(_read_file(path), path)),
    "index": Reader(
        "model.safetensors.index.json",
        index,
        lambda path: _backbone(_read_folder(path.parent), path.parent),
    ),
    "config": Reader(
        "config.json", lambda folder: language_model(folder, "config.json"), read_folder, 3
    ),
    "model": Reader(
        "model.safetensors",
        lambda folder: language_model(folder, "model.safetensors"),
        read_folder,
        3,
    ),
    "gguf": Reader("a.gguf", gguf, pretrained_language_model, 3),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_a_clear_error_or_is_read(reader: str, tmp_path: Path):
    assert_survives(READERS[reader], tmp_path)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_reading_takes_at_most_twice_what_the_file_holds(name: str, tmp_path: Path):
    path, state = tmp_path / name, {"patch_embed.proj.weight": torch.ones(5_000_000, 3)}
    torch.save(state, path) if name.endswith("pt") else save_file(state, path)
    grown, holds = growth_alone(
        "from metavpt.learners.weights import _backbone, _read_file",
        "_backbone(_read_file(path), path)",
        path,
    )
    assert holds > 6e7
    assert grown < 2 * holds + SPARE / 8


class Malicious:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("harm",))


def test_weights_that_bring_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for data in (pickle.dumps(Malicious()), saved({"random": Malicious()})):
        (tmp_path / "a.pt").write_bytes(data)
        with pytest.raises(MetaVPTError, match=r"a\.pt"):
            _read_file(tmp_path / "a.pt")
    assert not (tmp_path / "harm").exists()


def test_a_model_that_brings_code_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """transformers asks on the terminal by default, and waits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.py").write_text("import os\nos.mkdir('harm')\n")
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": '
        '{"AutoConfig": "model.Own", "AutoModelForCausalLM": "model.Own"}}'
    )
    with pytest.raises(MetaVPTError, match="cannot be loaded as a language model"):
        pretrained_language_model(tmp_path)
    assert not (tmp_path / "harm").exists()
