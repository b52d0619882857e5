#!/usr/bin/env python3
"""Small LoRA adapters on the tiny llama, and what PEFT's add_weighted_adapter makes of them: the fixtures of
tests/tune/merge_test.c. Usage: make_merges.py [OUT]; from the source root, with a Python that has torch,
transformers and peft.

OUT/NAME is an adapter; OUT/merged/CASE.safetensors what PEFT saves of a merge, and OUT/merged/cases.json which
adapters, weights, method, density and rank each case has. Random dropping (dare) is torch's own generator and
has no fixture."""
import json
import pathlib
import shutil
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

BASE = "tests/fixtures/models/llama"
V, K = [[f"layers.{l}.self_attn.{name}_proj" for l in range(3)] for name in "vk"]
# PEFT gives the merged adapter the first one's layers_to_transform, and then lacks the others' layers or fails: so
# targets are whole names here.
ADAPTERS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": V[:2]},
    "b": {"r": 4, "lora_alpha": 6, "target_modules": [V[1], K[1], K[2]], "use_rslora": True},
    "c": {"r": 2, "lora_alpha": 4, "target_modules": [V[1], K[1]],
          "rank_pattern": {"k_proj": 3}, "alpha_pattern": {"layers.1.self_attn.v_proj": 1}},
    "d": {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", V[0]]},
    "e": {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens"]},
}
CASES = {
    "linear": ("ab", [0.7, -0.4], {"combination_type": "linear"}),
    "cat": ("abc", [0.7, -0.4, 1.0], {"combination_type": "cat"}),
    "svd": ("abc", [0.7, -0.4, 1.0], {"combination_type": "svd"}),
    "svd_rank": ("ab", [1.0, 1.0], {"combination_type": "svd", "svd_rank": 6}),
    "ties": ("ab", [0.7, 0.6], {"combination_type": "ties", "density": 0.55}),
    "ties_frequency": ("aba", [0.7, 0.6, 0.5],
                       {"combination_type": "ties", "density": 0.3, "majority_sign_method": "frequency"}),
    "ties_svd": ("abc", [0.7, -0.6, 1.0], {"combination_type": "ties_svd", "density": 0.4}),
    "magnitude_prune": ("ab", [0.7, 0.6], {"combination_type": "magnitude_prune", "density": 0.5}),
    "magnitude_prune_svd": ("ac", [0.7, 0.6], {"combination_type": "magnitude_prune_svd", "density": 0.25}),
    "embedding_linear": ("de", [0.5, 0.5], {"combination_type": "linear"}),
    "embedding_svd": ("de", [0.5, 1.5], {"combination_type": "svd", "svd_rank": 3}),
}


def base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def make_adapter(settings, folder, generator):
    model = get_peft_model(base(), LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    # The base's own embedding, which PEFT would save beside an adapter of it, says nothing.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def merge(adapters, weights, settings, folder, out):
    model, names = None, []
    for i, adapter in enumerate(adapters):
        name = f"{adapter}{i}"
        if model is None:
            model = PeftModel.from_pretrained(base(), folder / adapter, adapter_name=name)
        else:
            model.load_adapter(folder / adapter, adapter_name=name)
        names.append(name)
    model.add_weighted_adapter(names, weights, "merged", **settings)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved, selected_adapters=["merged"], save_embedding_layers=False)
        shutil.copyfile(pathlib.Path(saved) / "merged/adapter_model.safetensors", out)


def main():
    warnings.simplefilter("ignore")
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures/merge")
    generator = torch.Generator().manual_seed(5)
    merged = folder / "merged"
    merged.mkdir(parents=True, exist_ok=True)
    for name, settings in ADAPTERS.items():
        make_adapter(settings, folder / name, generator)
    cases = []
    for name, (adapters, weights, settings) in CASES.items():
        merge(adapters, weights, settings, folder, merged / f"{name}.safetensors")
        cases.append({"name": name, "adapters": list(adapters), "weights": weights,
                      "method": settings["combination_type"], "density": settings.get("density", 1),
                      "rank": settings.get("svd_rank", 0),
                      "frequency": settings.get("majority_sign_method") == "frequency"})
    (merged / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
