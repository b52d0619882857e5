#!/usr/bin/env python3
"""Seeds for adapter_fuzz, merge_fuzz and options_fuzz: two files with a zero byte between them. Run from the source root with
a Python that has numpy and safetensors."""
import json
import pathlib

import numpy as np
from safetensors.numpy import save

SHAPES = {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8)}  # inputs, outputs


def adapter(rank, kind):
    tensors = {}
    for layer in range(2):
        for name, (inputs, outputs) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.mlp.{name}.lora_"
            tensors[prefix + "A.weight"] = np.ones((rank, inputs), kind)
            tensors[prefix + "B.weight"] = np.ones((outputs, rank), kind)
    return save(tensors)


def pairs(shapes, rank, kind):
    """By the names of modules: inputs, outputs, and the experts that are stacked."""
    random, tensors = np.random.default_rng(1), {}
    for name, (inputs, outputs, experts) in shapes.items():
        a = random.standard_normal((rank * experts, inputs)).astype(kind)
        b = random.standard_normal((outputs, rank * experts)).astype(kind)
        a_ending, b_ending = ("lora_embedding_A", "lora_embedding_B") if "embed" in name else \
            ("lora_A.weight", "lora_B.weight")
        tensors[f"base_model.model.model.{name}.{a_ending}"] = a
        tensors[f"base_model.model.model.{name}.{b_ending}"] = b
    return save(tensors)


def write(target, name, first, second):
    folder = pathlib.Path("tests/fuzz/seeds") / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(json.dumps(first).encode() + b"\0" + second)


plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False}
write("adapter_fuzz", "plain", plain, adapter(2, np.float32))
write("adapter_fuzz", "rslora", {**plain, "r": 1, "use_rslora": True}, adapter(1, np.float16))
write("adapter_fuzz", "patterns", {**plain, "r": 8, "rank_pattern": {"mlp.gate_proj": 2, "up_proj": 2, "down_proj": 2},
                                   "alpha_pattern": {"model.layers.1.mlp.up_proj": 3.5}}, adapter(2, np.float32))
write("adapter_fuzz", "dora", {**plain, "use_dora": True}, b"")
write("merge_fuzz", "attention", {**plain, "use_rslora": True},
      pairs({"layers.0.self_attn.q_proj": (8, 8, 1), "layers.1.self_attn.v_proj": (8, 4, 1)}, 2, np.float32))
write("merge_fuzz", "embedding", {**plain, "r": 1}, pairs({"embed_tokens": (20, 8, 1)}, 1, np.float16))
write("merge_fuzz", "experts", {**plain, "target_modules": ["w2"]},
      pairs({f"layers.1.block_sparse_moe.experts.{e}.w2": (12, 8, 1) for e in range(3)}, 2, np.float32))
write("merge_fuzz", "stacked", {**plain, "peft_version": "0.21.2", "target_parameters": [
    "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
      pairs({"layers.0.mlp.experts": (12, 8, 3), "layers.0.mlp.experts.base_layer": (8, 24, 3)}, 2, np.float16))
write("merge_fuzz", "patterns", {**plain, "r": 8, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.*": 3.5}},
      pairs({"layers.1.self_attn.q_proj": (8, 8, 1)}, 3, np.float32))
write("options_fuzz", "all", {"name": "x", "listen": ["a:1", "unix:/b"], "count": 7, "size": "8GiB", "share": 0.5,
                              "quiet": True}, b"--count=9")
write("options_fuzz", "texts", {"listen": "a:1", "count": "3", "size": 512, "share": "1e-3"}, b"-q")
write("options_fuzz", "wrong", {"cuont": 1}, b"--size=1.5M")
