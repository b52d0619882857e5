#!/usr/bin/env python3
"""Seeds for adapter_file_fuzz and options_fuzz. Run from the source root with a Python that has numpy, safetensors
and gguf. The shapes are those of the bases in tests/fuzz/adapter_file_fuzz.c."""
import json
import pathlib
import tempfile

import gguf
import numpy as np
from safetensors.numpy import save

LAYERS = "base_model.model.model.layers."
LLAMA, PAIRS, MIXTRAL, GPT_OSS, LLAMA4, DEEPSEEK, PHI3, GEMMA, QWEN_MOE = range(9)
MODULES = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (8, 4), "mlp.gate_proj": (8, 12),
           "mlp.up_proj": (8, 12), "mlp.down_proj": (12, 8)}  # inputs, outputs
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False}


def write(target, name, content):
    folder = pathlib.Path("tests/fuzz/seeds") / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def seed(name, base, config, tensors, kind=np.float32):
    file = save({key: np.ones(shape, kind) for key, shape in tensors.items()})
    write("adapter_file_fuzz", name, bytes([base]) + json.dumps(config).encode() + b"\0" + file)


def pair(module, inputs, outputs, rank=2):
    return {f"{module}.lora_A.weight": (rank, inputs), f"{module}.lora_B.weight": (outputs, rank)}


def lora(layers=(0, 1), rank=2, modules=MODULES):
    tensors = {}
    for layer in layers:
        for name, (inputs, outputs) in modules.items():
            tensors |= pair(f"{LAYERS}{layer}.{name}", inputs, outputs, rank)
    return tensors


def stacked(module, up, down):
    """Two experts of rank 2: the outer wrapper is of down_proj."""
    return pair(module + ".base_layer", *up, 4) | pair(module, *down, 4)


def gguf_seed(name, base, architecture, tensors):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 4.0)
        for key, shape in tensors.items():
            writer.add_tensor(key, np.ones(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write("adapter_file_fuzz", name, bytes([base]) + b"\0" + path.read_bytes())


seed("plain", LLAMA, PLAIN, lora())
seed("rslora", PAIRS, {**PLAIN, "r": 1, "use_rslora": True}, lora(rank=1), np.float16)
seed("patterns", LLAMA, {**PLAIN, "r": 8, "rank_pattern": {"(q|k|gate|up)_proj": 2, "down_proj": 2},
                         "alpha_pattern": {"model.layers.1.mlp.up_proj": 3.5}}, lora())
seed("dora", PAIRS, {**PLAIN, "use_dora": True},
     pair(LAYERS + "0.self_attn.q_proj", 8, 8) | {LAYERS + "0.self_attn.q_proj.lora_magnitude_vector": (8,)})
seed("saved", GEMMA, {**PLAIN, "modules_to_save": ["norm", "lm_head"], "bias": "all"},
     {"base_model.model.model.norm.weight": (8,), "base_model.model.lm_head.weight": (16, 8)})
seed("table", LLAMA, PLAIN, {"base_model.model.model.embed_tokens.lora_embedding_A": (2, 16),
                             "base_model.model.model.embed_tokens.lora_embedding_B": (8, 2),
                             "base_model.model.model.embed_tokens.base_layer.weight": (16, 8)})
targets = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "peft_version": "0.21.2"}
seed("experts", MIXTRAL, PLAIN | targets, stacked(LAYERS + "1.mlp.experts", (8, 24), (12, 8)))
seed("interleaved", GPT_OSS, PLAIN | targets, stacked(LAYERS + "1.mlp.experts", (8, 24), (12, 8)))
seed("swapped", LLAMA4, PLAIN | targets, stacked(LAYERS + "1.feed_forward.experts", (24, 8), (8, 12)))
seed("each", MIXTRAL, PLAIN, lora((1,), 2, {"block_sparse_moe.experts.1.w1": (8, 12)}))
seed("shared", QWEN_MOE, PLAIN, lora((1,), 2, {"mlp.shared_expert_gate": (8, 1), "mlp.gate": (8, 2)}))
seed("latent", DEEPSEEK, PLAIN, lora((0,), 2, {"self_attn.kv_b_proj": (6, 8), "self_attn.q_a_proj": (8, 6)}))
seed("fused", PHI3, PLAIN, lora((0,), 2, {"self_attn.qkv_proj": (8, 16), "mlp.gate_up_proj": (8, 24)}))
seed("ia3", PAIRS, {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
     {LAYERS + "0.self_attn.k_proj.ia3_l": (4, 1), LAYERS + "0.mlp.down_proj.ia3_l": (1, 12)})
seed("vera", LLAMA, {"peft_type": "VERA", "r": 2},
     {"base_model.vera_A": (2, 12), "base_model.vera_B": (8, 2), LAYERS + "0.mlp.down_proj.vera_lambda_b": (8,),
      LAYERS + "0.mlp.down_proj.vera_lambda_d": (2,)})
seed("prompt", GEMMA, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, {"prompt_embeddings": (3, 8)})
seed("prefix", PAIRS, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "num_attention_heads": 1},
     {"prompt_embeddings": (3, 16)})
seed("bottleneck", LLAMA, {"peft_type": "BOTTLENECK", "non_linearity": "relu", "use_parallel_adapter": True},
     {LAYERS + "0.mlp.down_proj.adapter_down.weight": (3, 12), LAYERS + "0.mlp.down_proj.adapter_up.weight": (8, 3)})
hub = "model.layers.1.output_adapters.adapters.x."
seed("hub", LLAMA, {"config": {"non_linearity": "relu", "original_ln_before": True, "scaling": "channel"}},
     {hub + "adapter_down.0.weight": (3, 8), hub + "adapter_down.0.bias": (3,), hub + "adapter_up.weight": (8, 3),
      hub + "adapter_up.bias": (8,), hub + "scaling": (8,)})
gguf_seed("gguf", LLAMA, "llama", {"blk.0.attn_q.weight.lora_a": (2, 8), "blk.0.attn_q.weight.lora_b": (8, 2),
                                   "token_embd.weight.lora_a": (16, 2), "token_embd.weight.lora_b": (8, 2)})
gguf_seed("gguf_experts", MIXTRAL, "llama", {"blk.1.ffn_up_exps.weight.lora_a": (2, 2, 8),
                                             "blk.1.ffn_up_exps.weight.lora_b": (2, 12, 2)})
options = {"name": "x", "listen": ["a:1", "unix:/b"], "count": 7, "size": "8GiB", "share": 0.5, "quiet": True}
for name, first, second in [("all", options, b"--count=9"),
                            ("texts", {"listen": "a:1", "count": "3", "size": 512, "share": "1e-3"}, b"-q"),
                            ("wrong", {"cuont": 1}, b"--size=1.5M")]:
    write("options_fuzz", name, json.dumps(first).encode() + b"\0" + second)
