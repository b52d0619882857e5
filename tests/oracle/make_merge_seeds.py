#!/usr/bin/env python3
"""Seeds for merge_fuzz: an adapter_config.json and an adapter_model.safetensors with a zero byte between them, in the
shape of that fuzzer's base. Run from the source root with a Python that has numpy and safetensors."""
import json
import pathlib

import numpy as np
from safetensors.numpy import save

PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False}


def pairs(shapes, rank, kind):
    """By the names of modules: inputs, outputs, and how many experts are stacked."""
    random, tensors = np.random.default_rng(1), {}
    for name, (inputs, outputs, experts) in shapes.items():
        a, b = ("embedding_A", "embedding_B") if "embed" in name else ("A.weight", "B.weight")
        for ending, shape in ((a, (rank * experts, inputs)), (b, (outputs, rank * experts))):
            tensors[f"base_model.model.model.{name}.lora_{ending}"] = random.standard_normal(shape).astype(kind)
    return save(tensors)


def seed(name, settings, tensors):
    folder = pathlib.Path("tests/fuzz/seeds/merge_fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(json.dumps({**PLAIN, **settings}).encode() + b"\0" + tensors)


seed("attention", {"use_rslora": True},
     pairs({"layers.0.self_attn.q_proj": (8, 8, 1), "layers.1.self_attn.v_proj": (8, 4, 1)}, 2, np.float32))
seed("embedding", {"r": 1}, pairs({"embed_tokens": (20, 8, 1)}, 1, np.float16))
seed("experts", {"target_modules": ["w2"]},
     pairs({f"layers.1.block_sparse_moe.experts.{e}.w2": (12, 8, 1) for e in range(3)}, 2, np.float32))
seed("stacked", {"peft_version": "0.21.2", "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
     pairs({"layers.0.mlp.experts": (12, 8, 3), "layers.0.mlp.experts.base_layer": (8, 24, 3)}, 2, np.float16))
seed("patterns", {"r": 8, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.*": 3.5}},
     pairs({"layers.1.self_attn.q_proj": (8, 8, 1)}, 3, np.float32))
