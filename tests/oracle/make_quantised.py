#!/usr/bin/env python3
"""Rows of nasty floats, and what gguf-py and PyTorch's rounding make of them.

Writes tests/fixtures/tune/quantised.bin: uint32 n, n floats, then the rows as F16, BF16, Q8_0 and Q4_1. Run
from the source root with a Python that has numpy and gguf."""
import struct

import gguf
import numpy as np

random = np.random.default_rng(1)
ramp = np.arange(32, dtype=np.float32)
one_large = np.zeros(32, np.float32)
one_large[7] = -65000
blocks = [
    np.zeros(32), np.full(32, -0.0), np.full(32, 3.7), np.full(32, -1e-9), one_large, ramp, -ramp, ramp - 15.5,
    (ramp - 16) / 2,                       # ties for a scale of 127ths
    np.where(ramp % 2 == 0, 127, 0.5), np.where(ramp % 2 == 0, -127, 1.5), np.where(ramp < 1, 15, ramp % 15 + 0.5),
    (ramp - 16) * 1e-36, ramp * 2.0**-24, ramp * 2.0**-26, 6e-8 * (ramp - 3),
    np.float32(1) + ramp * np.float32(2.0**-9), np.float32(1) + ramp * np.float32(2.0**-12), 65504 - ramp * 16,
]
blocks += [random.standard_normal(32) * 10.0**random.integers(-8, 4) for _ in range(220)]
for _ in range(8):
    power = 2.0**random.integers(-120, 5)
    halves = random.integers(-127, 127, 32) + 0.5
    blocks += [
        np.append(halves[:31], 127) * power,                              # ties of Q8_0, exactly
        (np.append(abs(halves[:30]) % 15, [0, 15]) - 4) * power,          # and of Q4_1
        np.nextafter((halves * 0.013).astype(np.float32), np.float32(0)), # the floats beside
        random.standard_normal(32) * 1e-36,                               # scales that are denormals
        np.append(random.standard_normal(31) * 1e-6, 60000),
    ]
rows = np.concatenate(blocks).astype(np.float32)
bits = rows.view(np.uint32).astype(np.uint64)
bf16 = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
with open("tests/fixtures/tune/quantised.bin", "wb") as f:
    f.write(struct.pack("<I", len(rows)) + rows.tobytes() + rows.astype(np.float16).tobytes() + bf16.tobytes())
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1):
        f.write(gguf.quants.quantize(rows, kind).tobytes())
