#!/usr/bin/env python3
"""Seeds for adapter_fuzz and options_fuzz: two files with a zero byte between them. Run from the source root with
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
write("options_fuzz", "all", {"name": "x", "listen": ["a:1", "unix:/b"], "count": 7, "size": "8GiB", "share": 0.5,
                              "quiet": True}, b"--count=9")
write("options_fuzz", "texts", {"listen": "a:1", "count": "3", "size": 512, "share": "1e-3"}, b"-q")
write("options_fuzz", "wrong", {"cuont": 1}, b"--size=1.5M")
