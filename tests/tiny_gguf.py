"""A tiny GGUF file."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter
from transformers import PreTrainedModel

from tests.tiny import make_tokenizer

LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_gguf(path: Path, model: PreTrainedModel) -> Path:
    """The tiny Llama as an unquantised GGUF file, in llama.cpp's order of rotary channels."""
    config, weights = model.config, model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
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
    vocabulary = make_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    # llama.cpp wants at least one merge; this one joins two tokens to one that exists.
    writer.add_token_list([*sorted(vocabulary, key=lambda token: vocabulary[token]), "th"])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(257)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for index in range(config.num_hidden_layers):
        for name, stock in LAYER_NAMES.items():
            weight = weights[f"model.layers.{index}.{stock}.weight"]
            if name in ("attn_q", "attn_k"):
                halves = weight.view(-1, 2, config.head_dim // 2, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape).contiguous()
            writer.add_tensor(f"blk.{index}.{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
