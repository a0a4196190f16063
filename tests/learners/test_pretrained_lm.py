import re

import pytest
import torch
from helpers.tiny_gguf import write_gguf
from helpers.tiny_lm import packed, tiny_lm
from transformers import AutoModelForCausalLM

from metavpt.errors import MetaVPTError
from metavpt.hypergradients import params
from metavpt.learners.pretrained_lm import LoRA, pretrained_language_model, random_language_model


@torch.no_grad()
def test_a_gguf_file_gives_the_same_logits_and_can_be_saved_again(tmp_path):
    learner, batch = tiny_lm(head_dim=4).float(), packed([[9], [6]])
    write_gguf(tmp_path / "tiny.gguf", learner)
    loaded = pretrained_language_model(tmp_path / "tiny.gguf", tail_layers=2)
    torch.testing.assert_close(loaded.logits(batch), learner.logits(batch), atol=1e-5, rtol=1e-5)
    loaded.save(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        again(batch.tokens[:1]).logits, learner.logits(batch)[:1], atol=1e-5, rtol=1e-5
    )


def test_loading_a_gguf_file_draws_no_random_number(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_lm())
    state = torch.get_rng_state()
    pretrained_language_model(tmp_path / "tiny.gguf")
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_a_folder_loads_with_or_without_adapters(tmp_path):
    learner, batch = tiny_lm("qwen3").float(), packed([[9], [6]])
    learner.save(tmp_path)
    for lora in (None, LoRA()):
        loaded = pretrained_language_model(tmp_path, lora=lora)
        torch.testing.assert_close(
            loaded.logits(batch), learner.logits(batch), atol=1e-5, rtol=1e-5
        )
        assert all("lora_" in name for name in params.named(loaded)) == (lora is not None)


def test_a_truncated_gguf_file_is_one_clear_error(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_lm())
    whole = file.read_bytes()
    for size in (len(whole) // 2, 100, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(MetaVPTError, match=r"tiny.gguf: cannot be loaded"):
            pretrained_language_model(file)


def test_layers_without_weights_are_refused_not_drawn_at_random(tmp_path):
    tiny_lm().save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(
        MetaVPTError, match=r"has no weights for model\.layers\.3\.\S+, .* 9 in all"
    ):
        pretrained_language_model(tmp_path)


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "vocab_size", "intermediate_size", "num_key_value_heads"]
)
def test_a_configuration_beyond_the_size_of_its_file_is_refused_before_it_is_built(tmp_path, key):
    tiny_lm().save(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(re.sub(rf'"{key}": \d+', f'"{key}": 1000000000', config.read_text()))
    with pytest.raises(MetaVPTError, match=r"which its \d+ bytes cannot hold"):
        pretrained_language_model(tmp_path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(MetaVPTError, match=r"none.gguf: no such GGUF file"):
        pretrained_language_model(tmp_path / "none.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MetaVPTError, match="empty: cannot be loaded as a language model"):
        pretrained_language_model(tmp_path / "empty")
    with pytest.raises(MetaVPTError, match="model_type=llamma"):
        random_language_model("llamma")
    with pytest.raises(MetaVPTError, match="target_modules"):
        tiny_lm(lora=LoRA(target_modules=["query"]))
