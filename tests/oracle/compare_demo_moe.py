#!/usr/bin/env python3
"""The mixtures of experts that `choir upcycle` writes, in other engines; choir runs with --exact.

  compare_demo_moe.py CHOIR --folder DIR                            logits in transformers (Mixtral), f32
  compare_demo_moe.py CHOIR --gguf FILE --llama-server PROGRAM      next-token log-probabilities in llama.cpp
  compare_demo_moe.py CHOIR --gguf FILE --llama-perplexity PROGRAM  perplexity of second halves in llama.cpp

llama.cpp rounds activations to 8 bits before it multiplies them with Q8_0, so its numbers differ by that. The
prompts are the first sentences of models/domains/*/valid.txt. Run from the source root; --folder wants a Python
with torch and transformers."""
import argparse
import array
import json
import pathlib
import re
import subprocess
import tempfile

from llama_server import Llama, log_softmax

N_TOKENS, N_WINDOWS = 60, 4


def choir(a, model, *arguments):
    return subprocess.run([a.choir, *arguments[:1], model, *arguments[1:]], check=True, capture_output=True,
                          text=True).stdout


def texts():
    return sorted(pathlib.Path("models/domains").glob("*/valid.txt"))


def prompts(a, model):
    for text in texts():
        ids = choir(a, model, "tokenize", text.read_text()[:600]).strip().split(",")[:N_TOKENS]
        yield text.parent.name, [int(i) for i in ids]


def choir_logits(a, model, ids):
    """A row of logits for each token."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "logits"
        choir(a, model, "logits", "--tokens", ",".join(map(str, ids)), "--exact", "--out", str(out))
        logits = array.array("f", out.read_bytes())
    vocab = len(logits) // len(ids)
    return [logits[i * vocab:(i + 1) * vocab] for i in range(len(ids))]


def against_transformers(a):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(a.folder)
    for text in texts():
        ours = choir(a, a.folder, "tokenize", "--file", str(text)).strip().split(",")
        same = [int(i) for i in ours] == tokenizer(text.read_text())["input_ids"]
        print(f"{text.parent.name:8} {len(ours)} ids of the whole text: {'the same' if same else 'DIFFERENT'}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(a.folder, dtype=torch.float32).eval()
    for name, ids in prompts(a, a.folder):
        ours = torch.tensor(choir_logits(a, a.folder, ids))
        with torch.inference_mode():
            theirs = model(torch.tensor([ids])).logits[0]
        most, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
        same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        print(f"{name:8} {len(ids)} tokens: largest difference {most:.2e}, {most / largest:.2e} of the largest logit; "
              f"best token the same at {same}", flush=True)


def against_llama_server(a):
    other = Llama(a.llama_server, a.gguf)
    try:
        for name, ids in prompts(a, a.gguf):
            ours, theirs = log_softmax(choir_logits(a, a.gguf, ids)[-1]), other.best(ids)
            best = max(range(len(ours)), key=ours.__getitem__)
            most = max(abs(ours[i] - x) for i, x in theirs)
            print(f"{name:8} {len(ids)} tokens: best token {best} against {theirs[0][0]}, largest difference "
                  f"of 20 log-probabilities {most:.6f}", flush=True)
    finally:
        other.close()


def against_llama_perplexity(a):
    for text in texts():
        ours = json.loads(choir(a, a.gguf, "perplexity", "--file", str(text), "--second-half", "--windows",
                                str(N_WINDOWS), "--exact", "--json"))["ppl"]
        told = subprocess.run([a.llama_perplexity, "-m", a.gguf, "-f", str(text), "-c", "512", "--chunks",
                               str(N_WINDOWS)], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        theirs = float(re.search(r"Final estimate: PPL = ([0-9.]+)", told.stdout)[1])
        print(f"{text.parent.name:8} {N_WINDOWS} windows of 512: perplexity {ours:.4f} against {theirs:.4f}, "
              f"{100 * (ours / theirs - 1):+.2f} %", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("choir")
    p.add_argument("--folder")
    p.add_argument("--gguf")
    p.add_argument("--llama-server")
    p.add_argument("--llama-perplexity")
    a = p.parse_args()
    if a.folder:
        against_transformers(a)
    if a.gguf and a.llama_server:
        against_llama_server(a)
    if a.gguf and a.llama_perplexity:
        against_llama_perplexity(a)


if __name__ == "__main__":
    main()
