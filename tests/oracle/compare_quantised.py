#!/usr/bin/env python3
"""Models whose matrices are of one quantised type each, against the same numbers as F32.

  compare_quantised.py CHOIR MODEL.gguf

MODEL.gguf gives shapes and metadata; its matrices' rows must be multiples of 256. Each type's blocks are drawn at
random, and gguf-py's dequantised numbers go into a second file. With --exact both must give the same bits; the fast path
rounds activations and keys. Wants a Python that has gguf and numpy."""
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np

# Offsets of the f16 scales in a block, and a size of scale that keeps answers in range.
TYPES = {"Q8_0": ([0], 2e-4), "Q4_0": ([0], 4e-3), "Q4_1": ([0, 2], 4e-3), "Q5_0": ([0], 4e-3), "Q5_1": ([0, 2], 4e-3),
         "Q2_K": ([80, 82], 2e-3), "Q3_K": ([108], 8e-4), "Q4_K": ([0, 2], 8e-5), "Q5_K": ([0, 2], 5e-5),
         "Q6_K": ([208], 3e-5), "IQ4_NL": ([0], 5e-4), "IQ4_XS": ([0], 2e-5), "MXFP4": ([], 0)}


def blocks_of(kind, n, rng):
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (n // elements, size), dtype=np.uint8)
    offsets, scale = TYPES[kind]
    for i, at in enumerate(offsets):
        sign = -1 if kind in ("Q4_1", "Q5_1") and i else 1
        halves = sign * (rng.random(len(blocks)) + 0.5) * scale / (1 + i)
        blocks[:, at:at + 2] = halves.astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(119, 122, len(blocks))
    return blocks


def write(source, path, kind, dequantised):
    rng, out = np.random.default_rng(7), gguf.GGUFWriter(path, source.fields["general.architecture"].contents())
    for key, field in source.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        add = out.add_array if field.types[0] == gguf.GGUFValueType.ARRAY else out.add_key_value
        add(key, field.contents(), *([] if add == out.add_array else [field.types[0]]))
    quantised = gguf.GGMLQuantizationType[kind]
    for tensor in source.tensors:
        shape = [int(n) for n in tensor.shape[::-1]]
        if len(shape) < 2 or "ffn_gate_inp" in tensor.name:
            out.add_tensor(tensor.name, np.array(tensor.data).reshape(shape))
            continue
        blocks = blocks_of(kind, int(np.prod(shape)), rng)
        if dequantised:
            out.add_tensor(tensor.name, gguf.quants.dequantize(blocks, quantised).reshape(shape).astype(np.float32))
        else:
            rows = blocks.reshape([*shape[:-1], -1])
            out.add_tensor(tensor.name, rows, raw_dtype=quantised)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def logits(choir, model, folder, *arguments):
    out = folder / "logits"
    subprocess.run([choir, "logits", model, "--tokens", "5,9,77,100,3,200,150,42,6,7,8,9", "--out", out, *arguments],
                   check=True, capture_output=True)
    return np.fromfile(out, "<f4")


source = gguf.GGUFReader(sys.argv[2])
print("| type | exact: same bits as F32 | fast path from exact |\n|---|---|---|")
for kind in TYPES:
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        write(source, folder / "codes.gguf", kind, False)
        write(source, folder / "numbers.gguf", kind, True)
        exact, numbers = (logits(sys.argv[1], folder / name, folder, "--exact") for name in ("codes.gguf", "numbers.gguf"))
        fast = logits(sys.argv[1], folder / "codes.gguf", folder)
    print(f"| {kind} | {'yes' if np.array_equal(exact, numbers) else 'NO'} | "
          f"{np.abs(fast - exact).max() / np.abs(exact).max():.1e} |", flush=True)
