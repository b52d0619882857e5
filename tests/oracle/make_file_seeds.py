#!/usr/bin/env python3
"""Small valid files of each format, from which the fuzzers and the truncation tests start.

  make_file_seeds.py OUT_DIR      (needs numpy, gguf, safetensors)"""
import pathlib
import sys

import gguf
import numpy as np
from safetensors.numpy import save_file

out = pathlib.Path(sys.argv[1])
out.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(1)
w = gguf.GGUFWriter(out / "small.gguf", "llama")
w.add_name("small")
w.add_array("tokenizer.ggml.tokens", ["a", "b", "", "é"])
w.add_array("tokenizer.ggml.scores", [0.0, -1.5, 2.0, 3.0])
w.add_bool("a.flag", True)
w.add_float64("a.real", 2.5)
w.add_int64("a.integer", -7)
w.add_tensor("x", rng.standard_normal((3, 5), dtype=np.float32))
for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1):
    data = gguf.quants.quantize(rng.standard_normal((2, 64), dtype=np.float32), kind)
    w.add_tensor(f"y.{kind.name}", data, raw_dtype=kind)
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
save_file({"x": np.zeros((2, 3), np.float32), "y": np.ones(4, np.float16)},
          out / "small.safetensors", metadata={"format": "pt"})
