#!/usr/bin/env python3
"""Real adapters against PEFT's own results, by hand: they and the real model are too large for the tests.

  compare_adapters.py CHOIR lora [--model MODEL] FOLDER...
  compare_adapters.py CHOIR table [--model MODEL] [--exact] --adapters DIR --texts DIR TABLE.json

lora: folders with an adapter, ref.json and ref.npz: prompts' ids, the last position's logits of the base, the adapter
and the merged model, greedy ids with their margins, all by PEFT in f32. MODEL is SmolLM2-135M-Instruct of the model
cache for those whose ref.json says so, else a folder of tests/fixtures/models. Prints the largest difference over the
largest logit in exact mode and whether the greedy tokens are the same; a difference above 2e-4, of the merged model
above 1e-3, ends it with 1.

table: perplexities of adapters (DIR/NAME) on texts (DIR/NAME/valid.txt), as TABLE.json has them: windows of its `ctx`
tokens, the text cut whole, so many of them spread evenly, each for itself. A window whose text is cut into the same
tokens again goes through `choir perplexity`, another through `choir logits`. More than 1 % of difference ends it with
1. Needs numpy; run it from the source root."""
import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

MODELS = pathlib.Path("tests/fixtures/models")
SMOL = "SmolLM2-135M-Instruct.Q4_1"


class Choir:
    def __init__(self, program, model, *options):
        self.program, self.model, self.options = program, str(model), options

    def run(self, verb, *arguments):
        return subprocess.run([self.program, verb, self.model, *map(str, arguments)], check=True, capture_output=True,
                              text=True).stdout

    def logits(self, ids, *more):
        with tempfile.NamedTemporaryFile() as out:
            self.run("logits", "--tokens", ",".join(map(str, ids)), "--out", out.name, *self.options, *more)
            return np.fromfile(out.name, "<f4").reshape(len(ids), -1)

    def tokenize(self, text):
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(text)
            file.flush()
            return json.loads(self.run("tokenize", "--file", file.name, "--json"))["ids"]


def share(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def compare_lora(program, model, folder):
    reference = json.loads((folder / "ref.json").read_text())
    arrays = np.load(folder / "ref.npz")
    base = MODELS / pathlib.Path(reference["model"]).name
    choir = Choir(program, base if base.is_dir() else model, "--exact")
    worst = {"base": 0.0, "adapter": 0.0, "merged": 0.0}
    same = True
    for i, p in enumerate(reference["prompts"]):
        adapted = choir.logits(p["ids"] + p["adapter"]["ids"][:-1], "--adapter", folder)[len(p["ids"]) - 1:]
        worst["base"] = max(worst["base"], share(choir.logits(p["ids"])[-1], arrays[f"p{i}_base_logits"]))
        for kind in ("adapter", "merged"):
            if f"p{i}_{kind}_logits" in arrays:
                worst[kind] = max(worst[kind], share(adapted[0], arrays[f"p{i}_{kind}_logits"]))
        same = same and adapted.argmax(1).tolist() == p["adapter"]["ids"]
    print(f"{folder.name:22} base {worst['base']:.1e}, adapter {worst['adapter']:.1e}, merged {worst['merged']:.1e}, "
          f"greedy {'the same' if same else 'DIFFERS'}", flush=True)
    return same and worst["adapter"] <= 2e-4 and worst["merged"] <= 1e-3


def window_nll(choir, ids, adapter):
    """Of the tokens behind the first, in nats; whether through `choir perplexity`."""
    with tempfile.NamedTemporaryFile("wb") as file:
        text = json.loads(choir.run("detokenize", "--json", ",".join(map(str, ids))))["text"]
        file.write(text.encode())
        file.flush()
        if "\ufffd" not in text and choir.tokenize(text) == ids:
            told = json.loads(choir.run("perplexity", "--file", file.name, "--context", len(ids), "--json", *choir.options,
                                        *adapter))
            assert told["tokens"] == len(ids) - 1
            return math.log(told["ppl"]), True
    logits = choir.logits(ids, *adapter)[:-1].astype(np.float64)
    top = logits.max(1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), ids[1:]]
    return float((np.log(np.exp(logits - top).sum(1)) + top[:, 0] - chosen).mean()), False


def compare_table(a):
    table = json.loads(a.what[0].read_text())
    choir, worst, through, n = Choir(a.choir, a.model, *(["--exact"] if a.exact else [])), 0.0, 0, 0
    windows = {}
    for column in table["columns"]:
        ids = choir.tokenize((a.texts / column / "valid.txt").read_text())
        k = len(ids) // table["ctx"]
        at = [table["ctx"] * (j * k // table["of"]) for j in table["window_numbers"]]
        windows[column] = [ids[i:i + table["ctx"]] for i in at]
    for row in table["rows"]:
        for i, column in enumerate(table["columns"]):
            adapter = [] if row == "base" else ["--adapter", a.adapters / row]
            nll = []
            for window in windows[column]:
                value, direct = window_nll(choir, window, adapter)
                nll.append(value)
                through, n = through + direct, n + 1
            ours, theirs = math.exp(sum(nll) / len(nll)), table["ppl"][row][i]
            worst = max(worst, abs(ours / theirs - 1))
            print(f"{row:8} on {column:8} {ours:8.3f}, PEFT {theirs:8.3f} ({100 * (ours / theirs - 1):+.2f} %)", flush=True)
    print(f"at most {100 * worst:.2f} % off; {through} of {n} windows through `choir perplexity`")
    return worst <= 0.01


def main():
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    p = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    p.add_argument("choir")
    p.add_argument("question", choices=["lora", "table"])
    p.add_argument("what", type=pathlib.Path, nargs="+")
    p.add_argument("--model", type=pathlib.Path, default=cache / "choir" / "models" / (SMOL + ".gguf"))
    p.add_argument("--exact", action="store_true")
    p.add_argument("--adapters", type=pathlib.Path, default=pathlib.Path("models/adapters"))
    p.add_argument("--texts", type=pathlib.Path, default=pathlib.Path("models/domains"))
    a = p.parse_args()
    if a.question == "table":
        sys.exit(not compare_table(a))
    sys.exit(not all([compare_lora(a.choir, a.model, folder) for folder in a.what]))


if __name__ == "__main__":
    main()
