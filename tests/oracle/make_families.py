#!/usr/bin/env python3
"""Makes the small models of every family in tests/fixtures/models, with PyTorch's results.

  make_families.py [NAME...]       all that are listed below, or those named

Shapes are odd on purpose: hidden sizes that no SIMD width divides, three heads, five or twelve experts, all experts
chosen, f16, f32, shards. Prompts have 1, 33 and 70 tokens. Run from the source root with a Python that has torch and
transformers; make_tiny.py says what each family is made of."""
import json
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
TARGET = HERE.parent / "fixtures/models"
COMMON = ["--vocab", "288", "--hidden", "60", "--heads", "3", "--kv-heads", "1", "--head-dim", "20", "--inter", "72",
          "--moe-inter", "40", "--layers", "3", "--experts", "6", "--topk", "2", "--max-prompt", "70", "--new", "12",
          "--max-pos", "256", "--window", "24"]
PROMPTS = ["H", "free software is a matter of liberty, not price. ", "This program is distributed in the hope that it "
           "will be useful, but WITHOUT ANY WARRANTY; without even the implied warranty of MERCHANTABILITY or FITNESS."]

# name: (make_tiny's family, what differs from COMMON)
FAMILIES = {
    "mixtral_odd": ("mixtral", ["--experts", "5", "--topk", "5"]),
    "olmoe_odd": ("olmoe", ["--kv-heads", "3"]),
    "qwen3_moe_odd": ("qwen3_moe", ["--experts", "5", "--topk", "3"]),
    "qwen2_moe": ("qwen2_moe", ["--experts", "5"]),
    # Dense layers among the others are not for GGUF, other chunks and patterns neither: hence second ones.
    "qwen2_moe_sparse": ("qwen2_moe", ["--experts", "5", "--config-json", '{"mlp_only_layers": []}']),
    "granitemoe": ("granitemoe", ["--dtype", "f16"]),
    "deepseek_v2": ("deepseek_v2", ["--experts", "5", "--topk", "5"]),
    "deepseek_v2_group": ("deepseek_v2_group", ["--experts", "8", "--hidden", "52", "--heads", "2"]),
    "deepseek_v3": ("deepseek_v3", ["--experts", "12", "--topk", "3", "--shard-size", "60KB"]),
    "gpt_oss": ("gpt_oss", ["--kv-heads", "3", "--experts", "5"]),
    "gpt_oss_mxfp4": ("gpt_oss", ["--mxfp4", "--hidden", "64", "--moe-inter", "32", "--experts", "5"]),
    "phimoe": ("phimoe", ["--dtype", "f32", "--experts", "5"]),
    "llama4": ("llama4", ["--layers", "4", "--experts", "5"]),
    "llama4_standard": ("llama4", ["--layers", "4", "--experts", "5", "--config-json",
                                   '{"attention_chunk_size": 8192, "no_rope_layer_interval": 4, "floor_scale": 8192}']),
    "glm4_moe": ("glm4_moe", ["--experts", "8", "--groups", "4", "--topk", "3"]),
    "dots1": ("dots1", ["--groups", "1", "--kv-heads", "3"]),
    "ernie4_5_moe": ("ernie4_5_moe", ["--bias", "--tie"]),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", ["--kv-heads", "3"]),
    "minimax_m2": ("minimax_m2", []),
    "yarn": ("yarn", []),
    "linear": ("linear", []),
    # Greedy steps pass the original context; Hugging Face turns a longer prompt by its whole length instead.
    "dynamic": ("dynamic", ["--max-pos", "40", "--max-prompt", "33"]),
    "gemma2": ("gemma2", []),
    "gemma3": ("gemma3", ["--layers", "6", "--inter", "48"]),
    "gemma3_inside": ("gemma3", ["--layers", "2"]),
    "phi3": ("phi3", ["--hidden", "48"]),
    "phi3_long": ("phi3_long", []),
    "granite": ("granite", []),
    "smollm3": ("smollm3", ["--layers", "4"]),
}


def add_predicting_layer(folder):
    """One more layer behind the others, as checkpoints that predict a second token have it (GLM-4.5)."""
    from safetensors.torch import load_file, save_file
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    last = config["num_hidden_layers"]
    for name, tensor in list(tensors.items()):
        if name.startswith(f"model.layers.{last - 1}."):
            tensors[name.replace(f".{last - 1}.", f".{last}.", 1)] = tensor.clone()
    norm, head = tensors["model.norm.weight"], tensors["lm_head.weight"]
    prefix = f"model.layers.{last}."
    tensors |= {prefix + "eh_proj.weight": head[:norm.numel()].repeat(1, 2).contiguous(), prefix + "enorm.weight": norm.clone(),
                prefix + "hnorm.weight": norm.clone(), prefix + "shared_head.norm.weight": norm.clone(),
                prefix + "shared_head.head.weight": head.clone(), prefix + "embed_tokens.weight": head.clone()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}, indent=2))


def put_inside(folder, model_type, rename):
    """The same as the text's part of a model that also sees: a configuration inside, other names, one more tower."""
    from safetensors.torch import load_file, save_file
    config = json.loads((folder / "config.json").read_text())
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["vision_tower.patch.weight"] = next(iter(tensors.values())).flatten()[:4].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outer = {"model_type": model_type, "text_config": config, "vision_config": {}, "eos_token_id": config["eos_token_id"]}
    (folder / "config.json").write_text(json.dumps(outer, indent=2))


def join_experts(folder):
    """Experts stacked, gate over up, as transformers has them in memory."""
    import torch
    from safetensors.torch import load_file, save_file
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = [e for e in range(config["num_experts"]) if f"{prefix}{e}.up_proj.weight" in tensors]
        if experts:
            take = {part: [tensors.pop(f"{prefix}{e}.{part}_proj.weight") for e in experts] for part in ("gate", "up", "down")}
            tensors[prefix + "gate_up_proj"] = torch.cat([torch.stack(take["gate"]), torch.stack(take["up"])], 1)
            tensors[prefix + "down_proj"] = torch.stack(take["down"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# As checkpoints before transformers 5 have it, and as it saves them.
INSIDE = {
    "llama4": ("llama4", lambda name: "language_model." + name),
    "gemma3_inside": ("gemma3", lambda name: name.replace("model.", "model.language_model.", 1)),
}


def make(name, folder):
    family, more = FAMILIES[name]
    command = [sys.executable, HERE / "make_tiny.py", "--arch", family, "--out", folder / name, *COMMON]
    for prompt in PROMPTS:
        command += ["--prompt", prompt]
    subprocess.run(command + more, check=True, stderr=subprocess.DEVNULL)
    if name == "glm4_moe":
        add_predicting_layer(folder / name)
    if name == "qwen2_moe":
        join_experts(folder / name)
    if name in INSIDE:
        put_inside(folder / name, *INSIDE[name])
    subprocess.run([sys.executable, HERE / "make_references.py", folder, TARGET, name], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for wanted in sys.argv[1:] or FAMILIES:
            make(wanted, pathlib.Path(temporary))
