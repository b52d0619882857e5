#!/usr/bin/env python3
"""Copies make_tiny.py's models into fixtures with their results in a form that C reads.

  make_references.py TINY_DIR OUT_DIR NAME...

OUT_DIR/NAME gets config.json, generation_config.json, tokenizer.json, tokenizer_config.json,
chat_template.jinja, the safetensors (with their index) and ref.bin. ref.bin is little-endian u32 unless said otherwise:
"CREF", version 1, vocab, n_layers, k (0: dense), n_prompts; per prompt n_tokens, ids [n_tokens],
logits f32 [n_tokens, vocab], with k > 0 experts [n_layers, n_tokens, k] and weights f32 likewise,
n_greedy, greedy ids, margins f32. Dense layers among MoE layers have experts and weights 0."""
import json
import pathlib
import shutil
import struct
import sys

import numpy as np

source, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
for name in sys.argv[3:]:
    (target / name).mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                 "chat_template.jinja"):
        shutil.copyfile(source / name / file, target / name / file)
    for file in source.glob(f"{name}/*.safetensors*"):
        shutil.copyfile(file, target / name / file.name)
    config = json.loads((source / name / "config.json").read_text())
    config = config.get("text_config", config)
    z = np.load(source / name / "ref.npz")
    n_prompts = sum(k.endswith("_ids") for k in z.files)
    n_layers, vocab = config["num_hidden_layers"], config["vocab_size"]
    k = max([z[key].shape[1] for key in z.files if key.startswith("p0_") and key.endswith("_experts")], default=0)
    with open(target / name / "ref.bin", "wb") as f:
        f.write(b"CREF" + struct.pack("<5I", 1, vocab, n_layers, k, n_prompts))
        for p in range(n_prompts):
            ids = z[f"p{p}_ids"].astype("<u4")
            f.write(struct.pack("<I", len(ids)) + ids.tobytes())
            f.write(z[f"p{p}_logits"].astype("<f4").tobytes())
            for what, kind in (("experts", "<u4"), ("weights", "<f4")):
                for layer in range(n_layers if k else 0):
                    dense = np.zeros((len(ids), k))
                    f.write(z.get(f"p{p}_L{layer}_{what}", dense).astype(kind).tobytes())
            greedy = z[f"p{p}_greedy"].astype("<u4")
            f.write(struct.pack("<I", len(greedy)) + greedy.tobytes())
            f.write(z[f"p{p}_margin"].astype("<f4").tobytes())
