#!/usr/bin/env python3
"""The small models of tests/fixtures/models in llama.cpp's server: next-token log-probabilities against Choir's.

  compare_families_llama.py CHOIR LLAMA_SERVER LLAMA_CPP [NAME...]

llama.cpp's own converter (LLAMA_CPP is its source) makes GGUF files of F32, since its kernels round activations to the
weights' type; choir runs with --exact, llama.cpp with a KV cache of f32 and without flash attention. Prompts of 1, 33 and
70 tokens are those of the references. A model that llama.cpp does not load is told, with its reason. Run from the source
root with a Python that has torch, transformers and safetensors."""
import array
import pathlib
import struct
import subprocess
import sys
import tempfile

from llama_server import Llama, log_softmax

HERE = pathlib.Path("tests/fixtures/models")


def prompts(name):
    """Token ids of ref.bin, see make_references.py."""
    data, at = (HERE / name / "ref.bin").read_bytes(), 24
    _, vocab, layers, k, n = struct.unpack_from("<5I", data, 4)
    for _ in range(n):
        tokens, = struct.unpack_from("<I", data, at)
        yield list(struct.unpack_from(f"<{tokens}I", data, at + 4))
        at += 4 + 4 * tokens * (1 + vocab + 2 * layers * k)
        at += 4 + 8 * struct.unpack_from("<I", data, at)[0]


def choir_last(choir, model, ids):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "logits"
        subprocess.run([choir, "logits", model, "--tokens", ",".join(map(str, ids)), "--exact", "--out", out], check=True,
                       capture_output=True)
        logits = array.array("f", out.read_bytes())
    return log_softmax(logits[-len(logits) // len(ids):])


def compare(choir, server, model):
    name = model.stem
    other = Llama(server, str(model), arguments=["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-warmup"])
    most, letter = 0, int(subprocess.run([choir, "tokenize", model, "a"], check=True, capture_output=True).stdout)
    try:
        for ids in prompts(name):
            ours = choir_last(choir, str(model), ids)
            most = max(most, max(abs(ours[i] - x) for i, x in other.best(ids, 250, letter)))
    finally:
        other.close()
    print(f"| {name} | {most:.1e} |", flush=True)


with tempfile.TemporaryDirectory() as made:
    converter = pathlib.Path(__file__).parent / "make_families_gguf.py"
    subprocess.run([sys.executable, converter, "--f32", "--out", made, sys.argv[3], *sys.argv[4:]], check=True,
                   capture_output=True)
    for file in sorted(pathlib.Path(made).glob("*.gguf")):
        try:
            compare(sys.argv[1], sys.argv[2], file)
        except (RuntimeError, OSError, KeyError) as error:
            print(f"| {file.stem} | {type(error).__name__}: {error} |", flush=True)
