#!/usr/bin/env python3
"""Some of make_adapters.py's adapters as GGUF files, written by llama.cpp's own converter.

  make_adapters_gguf.py LLAMA_CPP

LLAMA_CPP is llama.cpp's source (it lies in the PyPI source package llama-cpp-python). Writes NAME.gguf beside the
folders of tests/fixtures/adapters; their ref.bin holds for both. Run from the source root with a Python that has
torch, transformers and safetensors."""
import json
import pathlib
import subprocess
import sys
import tempfile

ADAPTERS = pathlib.Path("tests/fixtures/adapters")
# name: how the file holds its numbers
WANTED = {"lora": "f32", "lora_f16": "f16", "alora": "bf16", "by_expert_mixtral": "f32", "by_expert_qwen3_moe": "f16",
          "embeddings": "f32"}

llama_cpp = pathlib.Path(sys.argv[1])
for name, kind in WANTED.items():
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        # The converter looks for the context under older names.
        base = json.loads((pathlib.Path(config["base_model_name_or_path"]) / "config.json").read_text())
        base.setdefault("rope_theta", base.get("rope_parameters", {}).get("rope_theta"))
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(base))
        subprocess.run([sys.executable, llama_cpp / "convert_lora_to_gguf.py", "--base", folder, "--outtype", kind,
                        "--outfile", ADAPTERS / f"{name}.gguf", ADAPTERS / name], check=True)
