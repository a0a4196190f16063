from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_lm import VOCAB, packed, tiny_lm
from transformers import AutoModelForCausalLM

from metavpt import params
from metavpt.errors import MetaVPTError
from metavpt.learners.lm import LanguageModel
from metavpt.learners.pretrained_lm import LoRA, pretrained_language_model, random_language_model


def write_gguf(file: Path, learner: LanguageModel) -> None:
    """In llama.cpp's layout, which interleaves the two halves of every head's rotary dimensions."""
    model = learner.transformers_model
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"t{k}" for k in range(VOCAB)])
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, p in model.model.named_parameters():
        parts = name.split(".")
        weight = p.detach().float().numpy()
        if parts[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        writer.add_tensor(f"{block}{names[parts[-2]]}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_a_gguf_file_gives_the_same_logits_and_can_be_saved_again(tmp_path):
    learner, batch = tiny_lm(head_dim=4).float(), packed([[9], [6]])
    write_gguf(tmp_path / "tiny.gguf", learner)
    loaded = pretrained_language_model(tmp_path / "tiny.gguf", tail_layers=2)
    torch.testing.assert_close(loaded.logits(batch), learner.logits(batch), atol=1e-5, rtol=1e-5)
    loaded.save(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again(batch.tokens[:1]).logits, learner.logits(batch)[:1], atol=1e-5, rtol=1e-5)


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
        torch.testing.assert_close(loaded.logits(batch), learner.logits(batch), atol=1e-5, rtol=1e-5)
        assert all("lora_" in name for name in params.named(loaded)) == (lora is not None)


def test_a_truncated_gguf_file_is_one_clear_error(tmp_path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, tiny_lm())
    whole = file.read_bytes()
    for size in (len(whole) // 2, 100, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(MetaVPTError, match=r"tiny.gguf: cannot be loaded"):
            pretrained_language_model(file)


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
