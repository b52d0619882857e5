#!/usr/bin/env python3
"""The mixtures of experts that `choir upcycle` writes, in other engines: next-token log-probabilities.

  compare_demo_moe.py CHOIR --folder DIR                        in transformers (Mixtral), f32
  compare_demo_moe.py CHOIR --gguf FILE --llama-server PROGRAM  in llama.cpp (8-bit activations)

Prints, per prompt, whether the best token is the same and the largest difference among the other engine's 20
best. The prompts are the first sentences of models/domains/*/valid.txt. Run from the source root; --folder
wants a Python with torch and transformers."""
import argparse
import array
import json
import math
import pathlib
import subprocess
import tempfile
import time
import urllib.request

N_TOKENS = 60


def choir(a, model, *arguments):
    return subprocess.run([a.choir, *arguments[:1], model, *arguments[1:]], check=True, capture_output=True,
                          text=True).stdout


def prompts(a, model):
    for text in sorted(pathlib.Path("models/domains").glob("*/valid.txt")):
        ids = choir(a, model, "tokenize", text.read_text()[:600]).strip().split(",")[:N_TOKENS]
        yield text.parent.name, [int(i) for i in ids]


def log_softmax(logits):
    most = max(logits)
    total = most + math.log(sum(math.exp(x - most) for x in logits))
    return [x - total for x in logits]


def choir_logprobs(a, model, ids):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "logits"
        choir(a, model, "logits", "--tokens", ",".join(map(str, ids)), "--exact", "--out", str(out))
        logits = array.array("f", out.read_bytes())
    return log_softmax(logits[-(len(logits) // len(ids)):])


class Transformers:
    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def best(self, ids):
        with self.torch.inference_mode():
            logits = self.model(self.torch.tensor([ids])).logits[0, -1]
        best = self.torch.log_softmax(logits.double(), -1).topk(20)
        return list(zip(best.indices.tolist(), best.values.tolist()))

    def close(self):
        pass


class Llama:
    def __init__(self, program, model, port=50871):
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen([program, "-m", model, "--port", str(port), "-c", "1024"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            try:
                with urllib.request.urlopen(self.url + "/health"):
                    return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("llama-server did not start")

    def best(self, ids):
        body = json.dumps({"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 20}).encode()
        request = urllib.request.Request(self.url + "/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            top = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
        return [(t["id"], t["logprob"]) for t in top]

    def close(self):
        self.process.kill()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("choir")
    p.add_argument("--folder")
    p.add_argument("--gguf")
    p.add_argument("--llama-server")
    a = p.parse_args()
    model = a.folder or a.gguf
    other = Transformers(a.folder) if a.folder else Llama(a.llama_server, a.gguf)
    try:
        for name, ids in prompts(a, model):
            ours, theirs = choir_logprobs(a, model, ids), other.best(ids)
            best = max(range(len(ours)), key=ours.__getitem__)
            most = max(abs(ours[i] - x) for i, x in theirs)
            print(f"{name:8} {len(ids)} tokens: best token {best} against {theirs[0][0]}, largest difference "
                  f"of 20 log-probabilities {most:.6f}", flush=True)
    finally:
        other.close()


if __name__ == "__main__":
    main()
