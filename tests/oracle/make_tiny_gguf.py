#!/usr/bin/env python3
"""The tiny llama of tests/fixtures/models/llama as a GGUF file, laid out as llama.cpp's converter does.

Writes tests/fixtures/models/llama.gguf, BF16: the same weights, so that the same logits must come out. Run from
the source root with a Python that has torch, safetensors and gguf."""
import json
import pathlib

import gguf
import torch
from safetensors.torch import load_file

HERE = pathlib.Path("tests/fixtures/models")
NAMES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def gguf_name(name):
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[name] + ".weight"


def interleaved(weight, n_heads):
    """Rows of a head as pairs (i, i + d/2) side by side, as ggml's llama rope wants them."""
    rows, cols = weight.shape
    return weight.reshape(n_heads, 2, rows // n_heads // 2, cols).swapaxes(1, 2).reshape(rows, cols)


config = json.loads((HERE / "llama/config.json").read_text())
tokenizer = json.loads((HERE / "llama/tokenizer.json").read_text())
out = gguf.GGUFWriter(HERE / "llama.gguf", "llama")
out.add_name("tiny llama")
out.add_block_count(config["num_hidden_layers"])
out.add_context_length(config["max_position_embeddings"])
out.add_embedding_length(config["hidden_size"])
out.add_feed_forward_length(config["intermediate_size"])
out.add_head_count(config["num_attention_heads"])
out.add_head_count_kv(config["num_key_value_heads"])
out.add_layer_norm_rms_eps(config["rms_norm_eps"])
out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
out.add_rope_dimension_count(config["head_dim"])
out.add_vocab_size(config["vocab_size"])
out.add_tokenizer_model("gpt2")
out.add_tokenizer_pre("smollm")
tokens = {i: t for t, i in tokenizer["model"]["vocab"].items()}
special = {t["id"]: t["content"] for t in tokenizer["added_tokens"]}
tokens.update(special)
out.add_token_list([tokens[i] for i in range(config["vocab_size"])])
out.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL
                     for i in range(config["vocab_size"])])
out.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
out.add_bos_token_id(config["bos_token_id"])
out.add_eos_token_id(config["eos_token_id"])
for name, weight in load_file(HERE / "llama/model.safetensors").items():
    for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if part in name:
            weight = interleaved(weight, config[heads])
    if weight.dim() == 1:
        out.add_tensor(gguf_name(name), weight.float().numpy())
    else:
        out.add_tensor(gguf_name(name), weight.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
out.write_header_to_file()
out.write_kv_data_to_file()
out.write_tensors_to_file()
out.close()
