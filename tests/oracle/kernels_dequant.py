#!/usr/bin/env python3
"""Writes tests/fixtures/kernels/dequant.bin: random blocks of every tensor type and what gguf-py makes of
them. Records of little-endian u32 type id, elements, bytes; then the bytes; then the elements as f32.

    python3 tests/oracle/kernels_dequant.py          (needs numpy and gguf)
"""
import pathlib
import struct

import gguf
import numpy as np

BLOCKS = {"F32": 8, "F16": 64, "BF16": 64, "Q8_0": 6, "Q4_0": 6, "Q4_1": 6, "Q5_0": 6, "Q5_1": 6,
          "Q4_K": 3, "Q5_K": 3, "Q6_K": 3,
          "Q2_K": 3, "Q3_K": 3, "IQ4_NL": 6, "IQ4_XS": 3, "MXFP4": 6}
# Offsets of the f16 scales in a block.
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
          "Q2_K": [80, 82], "Q3_K": [108], "IQ4_NL": [0], "IQ4_XS": [0]}
# Ordinary numbers first, then subnormal, zero and the largest.
SPECIAL = [0x0001, 0x83FF, 0x0000, 0x8000, 0x7BFF, 0x0400]


def main():
    rng = np.random.default_rng(3)
    out = pathlib.Path(__file__).parent.parent / "fixtures/kernels/dequant.bin"
    with open(out, "wb") as f:
        for name, n_blocks in BLOCKS.items():
            kind = gguf.GGMLQuantizationType[name]
            elements, size = gguf.GGML_QUANT_SIZES[kind]
            data = rng.integers(0, 256, (n_blocks, size), dtype=np.uint8)
            if name == "F32":
                data = rng.standard_normal(n_blocks).astype("<f4").view(np.uint8).reshape(n_blocks, 4)
            elif name == "F16":  # no Inf and NaN
                data[:, 1] = np.where(data[:, 1] & 0x7C == 0x7C, data[:, 1] & 0xBF, data[:, 1])
            elif name == "BF16":
                data[:, 1] = np.where(data[:, 1] & 0x7F == 0x7F, data[:, 1] & 0xBF, data[:, 1])
            for b in range(n_blocks):
                for j, at in enumerate(SCALES.get(name, [])):
                    half = int(rng.integers(0, 0x7C00)) | int(rng.integers(0, 2)) << 15
                    if b >= n_blocks // 2:
                        half = SPECIAL[(b * 2 + j) % len(SPECIAL)]
                    data[b, at:at + 2] = list(struct.pack("<H", half))
            if name == "F32":
                values = data.reshape(-1).view("<f4")
            elif name == "F16":
                values = data.reshape(-1).view("<f2").astype("<f4")
            else:
                values = gguf.quants.dequantize(data, kind)
            values = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
            assert values.size == n_blocks * elements
            f.write(struct.pack("<III", int(kind), values.size, data.size))
            f.write(data.tobytes())
            f.write(values.tobytes())


main()
