#!/usr/bin/env python3
"""Smaller copies of rare experts: what they cost in perplexity, and what they save in reads.

For each type of copy and each share of every layer's experts that is computed from it: the perplexity over
the texts, and the bytes of experts that a decode under a memory budget reads. Which experts are rare is
counted over other texts.

  bench/small_experts.py MODEL --text VALID.txt [--text …] --usage-text SAMPLE.txt [--usage-text …]
"""
import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
USAGE_TOKENS = 8192  # of one text


def choir(args, *words):
    done = subprocess.run([str(args.choir), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"choir {words[0]}: {done.stderr.strip()}")
    return done.stdout


def count_usage(args, folder):
    """Routes of all usage texts, one file behind the other."""
    routes = folder / "routes.jsonl"
    with routes.open("w") as out:
        for i, text in enumerate(args.usage_text):
            ids = json.loads(choir(args, "tokenize", args.model, "--file", text, "--json"))["ids"][:USAGE_TOKENS]
            one = folder / f"{i}.jsonl"
            choir(args, "logits", args.model, "--tokens", ",".join(map(str, ids)), "--routes", one)
            out.write(one.read_text())
    return routes


def perplexity(args, model, share):
    nll = tokens = 0
    for text in args.text:
        o = json.loads(choir(args, "perplexity", model, "--file", text, "--context", args.context, "--windows", args.windows,
                             "--small-experts", share, "--json"))
        nll += o["nll"]
        tokens += o["tokens"]
    return math.exp(nll / tokens), tokens


def decode(args, model, share):
    """Bytes of experts read, and tokens/s; 0 bytes: they all fit."""
    run = json.loads(choir(args, "bench", model, "--memory", args.memory, "--prompt", 16, "--generate", args.tokens,
                           "--batch", args.batch, "--small-experts", share, "--json"))["runs"][0]
    return run.get("experts", {}).get("bytes_read", 0), run["decode_tokens_per_s"]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", help="a mixture of experts, not packed")
    p.add_argument("--text", required=True, action="append", help="is scored")
    p.add_argument("--usage-text", required=True, action="append", help="tells which experts are rare")
    p.add_argument("--types", default="q2,q3,q4_0")
    p.add_argument("--shares", default="0,0.25,0.5,0.75,1")
    p.add_argument("--quant", help="of the experts' own weights, as in choir pack")
    p.add_argument("--context", default=512, type=int)
    p.add_argument("--windows", default=4, type=int, help="of each text [4]")
    p.add_argument("--memory", help="budget while decoding [what every token meets, 40 %% of the experts, and 160 MB]")
    p.add_argument("--tokens", default=64, type=int, help="decoded [64]")
    p.add_argument("--batch", default=1, type=int)
    p.add_argument("--choir", default=ROOT / "build" / "choir", type=pathlib.Path)
    p.add_argument("--folder", help="for the packs, which are as large as the model [a temporary one]")
    args = p.parse_args()
    about = json.loads(choir(args, "info", args.model, "--json"))
    if args.memory is None:
        args.memory = int(about["bytes_dense"] + 0.4 * about["bytes_experts"] + 160e6)
    print(f"{about['name']}: {about['layers']} layers, {about['experts']} experts, {about['experts_per_token']} a token; "
          f"{about['types']}", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = pathlib.Path(folder)
        routes = count_usage(args, folder)
        print("| copies | share | perplexity | against none | GB read | tokens/s |\n|---|---:|---:|---:|---:|---:|", flush=True)
        none = None
        for kind in args.types.split(","):
            pack = folder / "model.choir"
            quant = ["--quant", args.quant] if args.quant else []
            choir(args, "pack", args.model, "-o", pack, *quant, "--small", kind, "--usage", routes)
            for share in args.shares.split(","):
                if none is not None and float(share) == 0:
                    continue  # the copies' type does not matter
                ppl, tokens = perplexity(args, pack, share)
                if none is None:
                    none = ppl
                read, speed = decode(args, pack, share)
                print(f"| {kind} | {share} | {ppl:.3f} | {100 * (ppl / none - 1):+.2f} % | {read / 1e9:.2f} | {speed:.1f} |",
                      flush=True)
            pack.unlink()
    print(f"{tokens} tokens scored, {args.tokens} x {args.batch} decoded within {int(args.memory) / 1e6:.0f} MB"
          if str(args.memory).isdigit() else f"{tokens} tokens scored, decoded within {args.memory}")


if __name__ == "__main__":
    main()
