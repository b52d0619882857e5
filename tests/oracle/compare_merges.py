#!/usr/bin/env python3
"""Adapters merged by `choir merge` and by PEFT's add_weighted_adapter, both run by PEFT: the logits, f32.

  compare_merges.py CHOIR [BASE ADAPTER…]

Without more words: adapters made here on the tiny llama (ranks alike and not, rsLoRA, patterns, embeddings), and of
stacked experts on the tiny mixtral, which PEFT itself does not merge: there the deltas are added up by hand. With a
BASE (a folder that transformers reads) and adapters of it: those. Prints for each method the largest difference over
the largest logit. Run from the source root with a Python that has torch, transformers and peft."""
import pathlib
import subprocess
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

IDS = [(i * 37 + 11) % 512 for i in range(40)]
WEIGHTS = [0.7, -0.4, 1.2]
METHODS = {
    "linear": {}, "cat": {}, "svd": {}, "ties": {"density": 0.6}, "ties_svd": {"density": 0.6},
    "magnitude_prune": {"density": 0.5}, "magnitude_prune_svd": {"density": 0.3},
}
EVEN = {
    "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "two": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "three": {"r": 4, "lora_alpha": 4, "target_modules": ["embed_tokens", "down_proj"]},
}
UNEVEN = {
    "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "two": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 7}},
    "three": {"r": 6, "lora_alpha": 4, "target_modules": ["lm_head", "down_proj"], "alpha_pattern": {"lm_head": 1}},
}
EXPERTS = {
    "one": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
    "two": {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
}


def load(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def save(base, settings, folder):
    model = get_peft_model(load(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn_like(weight) * 0.15)
    model.save_pretrained(folder)  # with a copy of the embedding where that is adapted


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


def by_peft(base, folders, method, settings):
    model = PeftModel.from_pretrained(load(base), folders[0], adapter_name="0")
    for i, folder in enumerate(folders[1:]):
        model.load_adapter(folder, adapter_name=str(i + 1))
    model.add_weighted_adapter([str(i) for i in range(len(folders))], WEIGHTS[:len(folders)], "merged",
                               combination_type=method, **settings)
    model.set_adapter("merged")
    return logits(model)


def by_hand(base, folders):
    """base + the weighted sum of what each adapter adds, its weights merged one at a time."""
    total = None
    start = {n: p.detach().clone() for n, p in load(base).named_parameters()}
    for folder, weight in zip(folders, WEIGHTS):
        merged = PeftModel.from_pretrained(load(base), folder).merge_and_unload()
        deltas = {n: weight * (p.detach() - start[n]) for n, p in merged.named_parameters()}
        total = deltas if total is None else {n: total[n] + d for n, d in deltas.items()}
    model = load(base)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(total[name])
    return logits(model)


def by_choir(choir, base, folders, method, settings, out):
    words = [word for f, w in zip(folders, WEIGHTS) for word in ("--adapter", f"{f}={w}")]
    words += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([choir, "merge", base, *words, "--method", method, "-o", out], capture_output=True, text=True)
    if done.returncode != 0:
        return done.stderr.strip()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(load(base), out)
    for w in said:
        if "key" in str(w.message):
            print("   PEFT says:", str(w.message)[:200])
    return logits(model)


def compare(choir, base, folders, what, methods, wanted):
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            ours = by_choir(choir, base, folders, method, METHODS[method], pathlib.Path(folder) / "out")
        if isinstance(ours, str):
            print(f"{what:8} {method:20} refused: {ours}", flush=True)
            continue
        theirs = wanted(method, METHODS[method])
        most = float((ours - theirs).abs().max() / theirs.abs().max())
        print(f"{what:8} {method:20} {most:.2e} of the largest logit", flush=True)


def main():
    choir, *given = sys.argv[1:]
    torch.manual_seed(3)
    warnings.simplefilter("ignore")
    if given:
        base, *folders = given
        return compare(choir, base, folders, "given", METHODS, lambda m, s: by_peft(base, folders, m, s))
    for what, base, adapters in (("even", "llama", EVEN), ("uneven", "llama", UNEVEN), ("experts", "mixtral", EXPERTS)):
        base = f"tests/fixtures/models/{base}"
        with tempfile.TemporaryDirectory() as folder:
            folders = [str(pathlib.Path(folder) / name) for name in adapters]
            for path, settings in zip(folders, adapters.values()):
                save(base, settings, path)
            if what == "experts":
                compare(choir, base, folders, what, ["cat"], lambda m, s: by_hand(base, folders))
            else:
                compare(choir, base, folders, what, METHODS if what == "even" else ["cat", "svd", "ties_svd"],
                        lambda m, s: by_peft(base, folders, m, s))


if __name__ == "__main__":
    main()
