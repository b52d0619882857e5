#!/usr/bin/env python3
"""Writes a GGUF file of a real mixture's shape with random weights: for speed, not for sense.

  bench/make_mixture.py --shape olmoe --type q4_0 --skew 1 -o olmoe.gguf

Every matrix has bytes of its own. Its numbers are small enough for activations to stay near the embeddings, so logits
are finite, and a row's routes depend on its token. With --skew Z the experts of a layer are wanted like ranks of Zipf's
law: every embedding has a part in common, and the gates' rows weigh it by -Z ln(rank), with ranks of each layer's own. What
came of it is printed, as the gates see the embeddings. Needs numpy and gguf (bench/requirements.txt)."""
import argparse
import math
import pathlib
import sys

import gguf
import numpy as np

SHAPES = {
    "tiny": dict(arch="olmoe", layers=2, hidden=256, heads=4, kv_heads=4, head=64, experts=8, used=2, ffn=128,
                 vocab=512, context=4096, pre="olmo"),
    "olmoe": dict(arch="olmoe", layers=16, hidden=2048, heads=16, kv_heads=16, head=128, experts=64, used=8, ffn=1024,
                  vocab=50304, context=4096, pre="olmo"),
    "qwen3-30b-a3b": dict(arch="qwen3moe", layers=48, hidden=2048, heads=32, kv_heads=4, head=128, experts=128, used=8,
                          ffn=768, vocab=151936, context=32768, pre="qwen2"),
}
TYPES = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}
# Bytes of a block's numbers, and their standard deviation when centred() has them.
BLOCKS = {gguf.GGMLQuantizationType.Q4_0: (16, 4.18), gguf.GGMLQuantizationType.Q8_0: (32, 73.6)}
SHARED = math.sqrt(0.5)  # of a normalised embedding lies along what all have in common


def byte_characters():
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(extra)) for b in range(256)]


def add_tokenizer(writer, vocab, pre):
    """Byte-level BPE with a few merges; the rest of the vocabulary is never made of a text."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "he")]
    tokens = byte_characters() + [a + b for a, b in merges] + ["<|endoftext|>"]
    types = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    end = len(tokens) - 1
    types += [gguf.TokenType.UNUSED] * (vocab - len(tokens))
    tokens += [f"<|unused_{i}|>" for i in range(vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def add_config(writer, s, name):
    writer.add_name(name)
    writer.add_block_count(s["layers"])
    writer.add_context_length(s["context"])
    writer.add_embedding_length(s["hidden"])
    writer.add_feed_forward_length(s["ffn"])
    writer.add_expert_feed_forward_length(s["ffn"])
    writer.add_head_count(s["heads"])
    writer.add_head_count_kv(s["kv_heads"])
    writer.add_key_length(s["head"])
    writer.add_value_length(s["head"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(s["experts"])
    writer.add_expert_used_count(s["used"])


def tensors(s):
    """(name, shape as rows last, gain): gain None is a vector of ones, a text names what makes it."""
    hidden, q, kv = s["hidden"], s["heads"] * s["head"], s["kv_heads"] * s["head"]
    whole = s["arch"] == "olmoe"  # its q and k are normalised as a whole, not head by head
    yield "token_embd", (s["vocab"], hidden), "embeddings"
    yield "output_norm", (hidden,), None
    yield "output", (s["vocab"], hidden), 1.0
    for i in range(s["layers"]):
        at = f"blk.{i}."
        yield at + "attn_norm", (hidden,), None
        yield at + "attn_q", (q, hidden), 1.0
        yield at + "attn_k", (kv, hidden), 1.0
        yield at + "attn_v", (kv, hidden), 1.0
        yield at + "attn_output", (hidden, q), 0.1
        yield at + "attn_q_norm", (q if whole else s["head"],), None
        yield at + "attn_k_norm", (kv if whole else s["head"],), None
        yield at + "ffn_norm", (hidden,), None
        yield at + "ffn_gate_inp", (s["experts"], hidden), "gate"
        yield at + "ffn_gate_exps", (s["experts"], s["ffn"], hidden), 1.0
        yield at + "ffn_up_exps", (s["experts"], s["ffn"], hidden), 1.0
        yield at + "ffn_down_exps", (s["experts"], hidden, s["ffn"]), 0.3


def centred(data, kind):
    """Without the one number that has no opposite: a mean of other than 0 adds up over the columns, layer by layer,
    until all tokens are alike."""
    if kind == gguf.GGMLQuantizationType.Q8_0:
        data[data == 0x80] = 0  # -128
    else:
        data[data & 0x0F == 0] |= 0x08  # -8, in either half
        data[data & 0xF0 == 0] |= 0x80
    return data


def random_blocks(chance, shape, kind, gain):
    """Uniform bytes under one scale: numbers of the deviation gain / sqrt(columns)."""
    data_bytes, deviation = BLOCKS[kind]
    blocks = np.empty((math.prod(shape) // 32, 2 + data_bytes), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(gain / math.sqrt(shape[-1]) / deviation).tobytes(), np.uint8)
    blocks[:, 2:] = centred(chance.integers(0, 256, (len(blocks), data_bytes), np.uint8), kind)
    return blocks.reshape(*shape[:-1], -1)


class Mixture:
    def __init__(self, shape, kind, skew, seed):
        self.s, self.kind, self.skew = shape, kind, skew
        self.chance = np.random.default_rng(seed)
        self.common = self.chance.standard_normal(shape["hidden"]).astype(np.float32)
        self.common /= np.linalg.norm(self.common)
        self.shares = []  # of each layer's rows that want the experts, the favourites first

    def embeddings(self, rows):
        """Half of a row's square lies along what all have in common."""
        hidden = self.s["hidden"]
        out = self.chance.standard_normal((rows, hidden), np.float32) * SHARED
        return out + SHARED * math.sqrt(hidden) * self.common

    def gate(self):
        """Logits of deviation 1, shifted by -skew ln(rank)."""
        n, hidden = self.s["experts"], self.s["hidden"]
        rows = self.chance.standard_normal((n, hidden), np.float32) / (SHARED * math.sqrt(hidden))
        rows -= (rows @ self.common)[:, None] * self.common
        ranks = self.chance.permutation(n) + 1
        rows -= (self.skew * np.log(ranks) / (SHARED * math.sqrt(hidden)))[:, None] * self.common
        chosen = np.argsort(-(self.embeddings(512) @ rows.T), axis=1)[:, :self.s["used"]]
        self.shares.append(np.sort(np.bincount(chosen.ravel(), minlength=n) / chosen.size)[::-1])
        return rows.astype(np.float32)

    def type_of(self, gain):
        if gain is None or gain == "gate":
            return gguf.GGMLQuantizationType.F32
        return gguf.GGMLQuantizationType.Q8_0 if gain == "embeddings" else self.kind

    def make(self, shape, gain):
        if gain is None:
            return np.ones(shape, np.float32)
        if gain == "gate":
            return self.gate()
        if gain == "embeddings":
            return gguf.quants.quantize(self.embeddings(shape[0]), gguf.GGMLQuantizationType.Q8_0)
        return random_blocks(self.chance, shape, self.kind, gain)

    def skew_text(self):
        share = np.mean(self.shares, axis=0)
        n = len(share)
        favourites = share[:max(1, n // 8)].sum()
        slope = -np.polyfit(np.log(np.arange(1, n + 1)), np.log(np.maximum(share, 1e-6)), 1)[0]
        return (f"the favourite eighth of the experts gets {100 * favourites:.0f} % of the rows (12 % if all are "
                f"alike), the least {100 * share[-1]:.2f} %; fitted exponent {slope:.2f}")


def write(path, shape_name, type_name="q4_0", skew=0.0, seed=1):
    """Writes the file, and says how skewed its routes are."""
    shape, kind = SHAPES[shape_name], TYPES[type_name]
    mixture = Mixture(shape, kind, skew, seed)
    partial = pathlib.Path(f"{path}.partial")
    writer = gguf.GGUFWriter(partial, shape["arch"])
    add_config(writer, shape, f"random-{shape_name}")
    add_tokenizer(writer, shape["vocab"], shape["pre"])
    for name, dims, gain in tensors(shape):
        of = mixture.type_of(gain)
        if of == gguf.GGMLQuantizationType.F32:
            writer.add_tensor_info(name + ".weight", dims, np.dtype(np.float32), 4 * math.prod(dims))
        else:
            n_bytes = gguf.quant_shape_to_byte_shape(dims, of)
            writer.add_tensor_info(name + ".weight", n_bytes, np.dtype(np.uint8), math.prod(n_bytes), of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, dims, gain in tensors(shape):
        writer.write_tensor_data(mixture.make(dims, gain))
    writer.close()
    partial.rename(path)
    return mixture.skew_text()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="olmoe")
    p.add_argument("--type", choices=TYPES, default="q4_0")
    p.add_argument("--skew", type=float, default=0.0, metavar="Z", help="0: all experts alike [0]")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("-o", "--out", required=True, type=pathlib.Path)
    args = p.parse_args()
    said = write(args.out, args.shape, args.type, args.skew, args.seed)
    print(f"{args.out}: {args.out.stat().st_size / 1e9:.2f} GB; {said}")


if __name__ == "__main__":
    sys.exit(main())
