#!/usr/bin/env python3
"""The small models of tests/fixtures/models as GGUF files, written by llama.cpp's own converter.

  make_families_gguf.py [--out FOLDER] [--f32] LLAMA_CPP [NAME...]

LLAMA_CPP is llama.cpp's source (it lies in the PyPI source package llama-cpp-python). The converter knows tokenizers
by the hash of what they make of a text; that of these models is ours, so it is told: byte-level BPE with single
digits, which is "smollm". Weights stay as they are (BF16, F16, F32), or are all F32. Run from the source root with a Python that has
torch, transformers and safetensors."""
import argparse
import inspect
import json
import logging
import pathlib
import shutil
import sys
import tempfile


HERE = pathlib.Path("tests/fixtures/models")
parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
parser.add_argument("--out", type=pathlib.Path, default=HERE)
parser.add_argument("--f32", action="store_true")
parser.add_argument("llama_cpp")
parser.add_argument("names", nargs="*")
arguments = parser.parse_args()
sys.path[:0] = [arguments.llama_cpp + "/gguf-py", arguments.llama_cpp]
import gguf  # noqa: E402
import torch  # noqa: E402
from conversion import ModelBase, ModelType, TextModel, get_model_architecture, get_model_class  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
TextModel.does_token_look_special = lambda self, token: False


# llama.gguf is make_tiny_gguf.py's; GGUF has no dynamic rope; a converted mistral loses its window, llama4 its chunks, qwen2_moe has dense
# layers; the last three are large, and have odd twins.
LEFT_OUT = ["llama", "dynamic", "mistral", "llama4", "gemma3_inside", "qwen2_moe", "mixtral", "olmoe", "qwen3_moe"]

JOINED = ["qwen2", "qwen3_moe_odd"]  # q, k and v in one tensor


def set_vocab(self):
    self._set_vocab_gpt2()


def adjust(config):
    """What the converter looks for under the names of the checkpoints' own code."""
    old = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"} if config["model_type"] == "ernie4_5_moe" else {}
    for new, name in old.items():
        if new in config and name not in config:
            config[name] = config[new]
    if config["model_type"] == "hunyuan_v1_moe":
        n = config["num_hidden_layers"]
        config.update(moe_intermediate_size=[config["intermediate_size"]] * n, num_shared_expert=[1] * n,
                      moe_topk=[config["num_experts_per_tok"] if "moe_topk" not in config else config["moe_topk"]] * n)
    if config["model_type"] == "phimoe":
        config["architectures"] = ["PhiMoEForCausalLM"]
        config["original_max_position_embeddings"] = config["max_position_embeddings"]
    if config["model_type"] in ("deepseek_v3", "dots1", "minimax_m2"):
        config["scoring_func"] = "sigmoid"
    rope = config.get("rope_parameters", {})
    if "full_attention" not in rope and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    if rope.get("partial_rotary_factor"):
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return config


def convert(name, target):
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / name
        shutil.copytree(HERE / name, folder)
        config = adjust(json.loads((folder / "config.json").read_text()))
        (folder / "config.json").write_text(json.dumps(config))
        hparams = ModelBase.load_hparams(folder, False)
        model = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        for base in inspect.getmro(model):
            if "set_vocab" in vars(base):
                base.set_vocab = set_vocab
        kinds = {"bfloat16": "MOSTLY_BF16", "float16": "MOSTLY_F16", "float32": "ALL_F32"}
        kind = gguf.LlamaFileType["ALL_F32" if arguments.f32 else kinds[config.get("dtype") or "bfloat16"]]
        with torch.inference_mode():
            model(folder, kind, target, eager=True, model_name="tiny " + name, fuse_qkv=name in JOINED).write()


if __name__ == "__main__":
    logging.disable(logging.INFO)
    for wanted in arguments.names or [p.name for p in sorted(HERE.iterdir()) if p.is_dir() and p.name not in LEFT_OUT]:
        try:
            convert(wanted, arguments.out / f"{wanted}.gguf")
            print(f"{wanted:20s} {(arguments.out / f'{wanted}.gguf').stat().st_size} bytes")
        except Exception as error:  # what the converter refuses is told, and the others go on
            print(f"{wanted:20s} not converted: {type(error).__name__}: {str(error)[:200]}")
