#!/usr/bin/env python3
"""Makes models of every family at shapes, seeds and types of its own choosing, and compares Choir with PyTorch.

  compare_families.py CHOIR [--families a,b] [--rounds 3] [--seed 1]

Each model is made by make_tiny.py: one to seven heads, odd sizes, three to sixteen experts, all of them chosen now and
then, bf16, f16 or f32, one file or shards, prompts of 1, 33 and up to 90 tokens. Checked with --exact: logits within 2e-4
of the largest, the experts of every layer and token, their weights within 1e-5, the greedy continuation wherever its
margin is above 1e-3. Prints a line a model, and at the end a table. Run from the source root with a Python that has torch
and transformers."""
import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

import numpy as np

import make_tiny

TEXTS = ["H", "free software is a matter of liberty, not price. " * 2,
         "This program is distributed in the hope that it will be useful, but WITHOUT ANY WARRANTY; without even the "
         "implied warranty of MERCHANTABILITY."]
GROUPS = {"deepseek_v2_group": 4, "deepseek_v3": 4}
# Settings that some files have and others not; every second model gets one.
VARIANTS = {
    "llama": [{"attention_bias": True, "mlp_bias": True}],
    "qwen2": [{"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}],
    "qwen3": [{"attention_bias": True}],
    "gemma2": [{"attn_logit_softcapping": None, "final_logit_softcapping": None}],
    "phi3": [{"sliding_window": None}],
    "mixtral": [{"sliding_window": 9}],
    "phimoe": [{"sliding_window": 9}, {"attention_bias": False, "lm_head_bias": False}],
    "qwen2_moe": [{"mlp_only_layers": [0], "norm_topk_prob": True}, {"decoder_sparse_step": 2, "qkv_bias": False}],
    "qwen3_moe": [{"norm_topk_prob": False}, {"mlp_only_layers": [1]}],
    "olmoe": [{"norm_topk_prob": True}],
    "deepseek_v2": [{"norm_topk_prob": True, "routed_scaling_factor": 3.0}],
    "deepseek_v3": [{"rope_interleave": False}, {"norm_topk_prob": False}, {"q_lora_rank": None}],
    "llama4": [{"attn_temperature_tuning": False, "use_qk_norm": False}],
    "glm4_moe": [{"use_qk_norm": False, "attention_bias": False}],
}


def shape(family, rng):
    heads = rng.choice([1, 2, 3, 5, 6, 7])
    kv = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    size = 2 * rng.randint(3, 14)
    if family.startswith("deepseek"):  # half of hidden is the latent, which PyTorch's complex numbers want even
        size = 4 * rng.randint(2, 7)
    groups = GROUPS.get(family, rng.choice([1, 2, 3]))
    experts = groups * rng.randint(2, 4)
    most = experts // groups * ((groups + 1) // 2) if family in GROUPS or family in ("glm4_moe", "dots1") else experts
    if family == "dots1":
        groups, most = 1, experts
    k = rng.choice([1, 2, most, rng.randint(1, most)])
    return dict(hidden=heads * size, heads=heads, kv_heads=kv, head_dim=2 * rng.randint(3, 14), layers=rng.randint(2, 5),
                inter=rng.randint(9, 90), moe_inter=rng.randint(9, 60), experts=experts, topk=min(k, most), groups=groups,
                window=rng.randint(3, 40), vocab=rng.randint(270, 330), dtype=rng.choice(["bf16", "f16", "f32"]),
                shard_size=rng.choice(["50GB", "60KB"]), tie=rng.random() < 0.3, bias=rng.random() < 0.5,
                seed=rng.randint(1, 10 ** 6), rope_theta=rng.choice([1e4, 5e5]), max_pos=256,
                max_prompt=rng.choice([33, 60, 90]), new=8,
                config_json=json.dumps(rng.choice(VARIANTS.get(family, [{}]) if rng.random() < 0.5 else [{}])))


def make(family, folder, rng):
    parser_args = ["make_tiny.py", "--arch", family, "--out", str(folder)]
    for key, value in shape(family, rng).items():
        if value is True:
            parser_args.append("--" + key)
        elif value is not False:
            parser_args += ["--" + key.replace("_", "-"), str(value)]
    for text in TEXTS:
        parser_args += ["--prompt", text]
    run = subprocess.run([sys.executable, pathlib.Path(__file__).parent / "make_tiny.py", *parser_args[1:]],
                         capture_output=True, text=True)
    if not (folder / "ref.npz").exists():
        raise RuntimeError("make_tiny: " + (run.stderr or run.stdout).strip().splitlines()[-1][:200])
    return " ".join(parser_args[5:-6])


def choir(binary, folder, ids, routed):
    out, routes = folder / "out.f32", folder / "out.routes"
    command = [binary, "logits", folder, "--tokens", ",".join(map(str, ids)), "--exact", "--out", out]
    run = subprocess.run(command + (["--routes", routes] if routed else []), capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(run.stderr.strip())
    chosen = [json.loads(line) for line in open(routes)] if routed else []
    return np.fromfile(out, "<f4").reshape(len(ids), -1), {(r["layer"], r["token"]): r for r in chosen}


def margin(scores, k):
    """the least distance of two router logits at the border of the choice"""
    s = np.sort(scores)[::-1]
    return float("inf") if k >= len(s) else float(s[k - 1] - s[k])


def compare(binary, folder):
    z = np.load(folder / "ref.npz")
    layers = sorted({int(key.split("_")[1][1:]) for key in z.files if key.endswith("_experts")})
    worst = dict(logits=0.0, weights=0.0, flips=0, greedy=0)
    for p in range(len(TEXTS)):
        ids, reference = z[f"p{p}_ids"], z[f"p{p}_logits"]
        logits, routes = choir(binary, folder, ids, bool(layers))
        worst["logits"] = max(worst["logits"], float(np.abs(logits - reference).max() / np.abs(reference).max()))
        for layer in layers:
            experts, weights = z[f"p{p}_L{layer}_experts"], z[f"p{p}_L{layer}_weights"]
            scores = z[f"p{p}_L{layer}_router_logits"]
            for token in range(len(ids)):
                mine = routes[layer, token]
                got = dict(zip(mine["experts"], mine["weights"]))
                wanted = dict(zip(map(int, experts[token]), map(float, weights[token])))
                if set(got) != set(wanted):
                    worst["flips"] += margin(scores[token], len(wanted)) > 1e-5
                    continue
                worst["weights"] = max(worst["weights"], max(abs(got[e] - wanted[e]) for e in got))
        greedy, margins = z[f"p{p}_greedy"], z[f"p{p}_margin"]
        logits, _ = choir(binary, folder, [*ids, *greedy[:-1]], False)
        best = logits[len(ids) - 1:].argmax(1)
        worst["greedy"] += int(((best != greedy) & (margins > 1e-3)).sum())
    good = worst["logits"] <= 2e-4 and worst["weights"] <= 1e-5 and worst["flips"] == worst["greedy"] == 0
    return good, worst


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("choir")
    parser.add_argument("--families", default=",".join(make_tiny.ARCHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    a = parser.parse_args()
    rng, rows, failed = random.Random(a.seed), [], 0
    for family in a.families.split(","):
        total = dict(logits=0.0, weights=0.0)
        for _ in range(a.rounds):
            with tempfile.TemporaryDirectory() as temporary:
                folder = pathlib.Path(temporary) / family
                what = ""
                try:
                    what = make(family, folder, rng)
                    good, worst = compare(os.path.abspath(a.choir), folder)
                except RuntimeError as error:
                    good, worst = False, str(error)
                failed += not good
                print("good" if good else "BAD ", family, worst, "" if good else what, flush=True)
                if isinstance(worst, dict):
                    total = {key: max(total[key], worst[key]) for key in total}
        rows.append(f"| {family} | {a.rounds} | {total['logits']:.1e} | {total['weights']:.1e} |")
    print("\n| family | models | logits | weights |\n|---|---|---|---|", *rows, sep="\n")
    sys.exit(failed > 0)


main()
