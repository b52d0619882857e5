#!/usr/bin/env python3
"""How fast are prefill and decode against llama.cpp on the same file with the same threads?

  bench/against_llama.py MODEL.gguf [--choir build/choir] [--threads 2] [--rounds 7]

Runs both programs in turn, so that a noisy machine hits both, and prints the median of the rounds'
ratios (above 1: Choir is faster). --peer names a folder with llama.cpp's programs; without it they are
built once from the PyPI source package."""
import argparse
import json
import pathlib
import statistics
import subprocess

import peer


def run_choir(a, prompt, generate):
    out = subprocess.run([a.choir, "bench", a.model, "--prompt", str(prompt), "--generate",
                          str(generate), "--batch", "1", "--threads", str(a.threads), "--json"],
                         check=True, capture_output=True, text=True).stdout
    result = json.loads(out)
    run = next(r for r in result["runs"] if r["batch"] == 1)
    return run["prefill_tokens_per_s"], run["decode_tokens_per_s"]


def run_llama(a, programs, prompt, generate):
    out = subprocess.run([str(programs / "llama-bench"), "-m", a.model, "-t", str(a.threads), "-p",
                          str(prompt), "-n", str(generate), "-r", "1", "-o", "json"],
                         check=True, capture_output=True, text=True).stdout
    runs = json.loads(out)
    prefill = next(r["avg_ts"] for r in runs if r["n_prompt"] > 0)
    decode = next(r["avg_ts"] for r in runs if r["n_gen"] > 0)
    return prefill, decode


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--choir", default="build/choir")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--generate", type=int, default=128)
    p.add_argument("--peer", help="folder with llama-bench")
    a = p.parse_args()

    programs = pathlib.Path(a.peer) if a.peer else peer.build()
    prefill, decode = [], []
    for i in range(a.rounds):
        ours = run_choir(a, a.prompt, a.generate)
        theirs = run_llama(a, programs, a.prompt, a.generate)
        prefill.append(ours[0] / theirs[0])
        decode.append(ours[1] / theirs[1])
        print(f"round {i + 1}: prefill {ours[0]:.0f} against {theirs[0]:.0f} tokens/s "
              f"({prefill[-1]:.2f}), decode {ours[1]:.0f} against {theirs[1]:.0f} "
              f"({decode[-1]:.2f})", flush=True)
    print(f"median of {a.rounds} ratios: prefill {statistics.median(prefill):.2f}, "
          f"decode {statistics.median(decode):.2f}")


if __name__ == "__main__":
    main()
