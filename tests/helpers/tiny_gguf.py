"""A language model of a few thousand parameters in a GGUF file."""

from pathlib import Path

import gguf
import numpy as np
from helpers.tiny_lm import VOCAB

from metavpt.learners.lm import LanguageModel


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
    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names |= {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    for name, p in model.model.named_parameters():
        parts = name.split(".")
        weight = p.detach().float().numpy()
        if parts[-2] in ("q_proj", "k_proj"):
            heads = (
                config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
            )
            weight = (
                weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            )
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        writer.add_tensor(f"{block}{names[parts[-2]]}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
