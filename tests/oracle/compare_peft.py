#!/usr/bin/env python3
"""Adapters as PEFT writes them, merged by PEFT and by `choir upcycle`: the logits of expert 1 against those of
PEFT's merged model, f32.

  compare_peft.py CHOIR

Prints the largest difference over the largest logit for each kind of adapter, or choir's refusal: PiSSA and
OLoRA must be refused. Run from the source root with a Python that has torch, transformers and peft."""
import array
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

BASE = "tests/fixtures/models/llama"
IDS = [(i * 37 + 11) % 512 for i in range(40)]
MLP = ["gate_proj", "up_proj", "down_proj"]
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.mlp.up_proj": 7, "down_proj": 3},
                 "alpha_pattern": {"gate_proj": 5, "model.layers.2.mlp.up_proj": 12}},
    "one layer": {"layers_to_transform": [1]},
    "one matrix": {"target_modules": MLP[:1]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


def base():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def save_adapter(settings, folder):
    model = get_peft_model(base(), LoraConfig(**{"target_modules": MLP, "r": 4, "lora_alpha": 8} | settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)


def peft_logits(folder):
    model = PeftModel.from_pretrained(base(), folder).merge_and_unload()
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


def choir_logits(choir, model, out):
    subprocess.run([choir, "logits", model, "--tokens", ",".join(map(str, IDS)), "--exact", "--force-expert", "1",
                    "--out", out], check=True, capture_output=True)
    return torch.tensor(array.array("f", out.read_bytes())).view(len(IDS), -1)


def main():
    choir = sys.argv[1]
    torch.manual_seed(3)
    for name, settings in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            adapter, moe = pathlib.Path(folder) / "adapter", pathlib.Path(folder) / "moe"
            save_adapter(settings, adapter)
            made = subprocess.run([choir, "upcycle", BASE, "--expert", f"a={adapter}", "--gate-init", "uniform",
                                   "--quant", "f32", "-o", moe], capture_output=True, text=True)
            if made.returncode != 0:
                print(f"{name:10} refused: {made.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            theirs, ours = peft_logits(adapter), choir_logits(choir, moe, moe / "logits")
            most = float((ours - theirs).abs().max() / theirs.abs().max())
            print(f"{name:10} {most:.2e} of the largest logit", flush=True)


if __name__ == "__main__":
    main()
