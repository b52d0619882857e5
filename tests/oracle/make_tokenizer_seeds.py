#!/usr/bin/env python3
"""Small seeds for the fuzz targets of the tokenizer and of config.json, made from the fixtures.

  make_tokenizer_seeds.py tests/fixtures tests/fuzz/seeds"""
import json
import pathlib
import sys

fixtures, out = (pathlib.Path(p) for p in sys.argv[1:3])
MODELS = {p.stem: json.loads(p.read_text()) for p in (fixtures / "tokenizer/models").glob("*.json")}
TEXTS = json.loads((fixtures / "tokenizer/texts.json").read_text())
# In the order of tests/fuzz/tokenizer_text_fuzz.c's first bytes; any order makes valid seeds.
TEXT_CASES = 22


def write(target, name, data):
    folder = out / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def shrunk(model, n_merges, keep):
    """the first merges, their parts, a few characters more, and all ids without holes"""
    merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"][:n_merges]]
    wanted = {t for a, b in merges for t in (a, b, a + b)} | set("abcehlortw 1.▁Ġ")
    kept = [t for i, t in enumerate(model["vocab"]) if i < 3 or t in wanted or keep(t)]
    small = dict(model, vocab={t: i for i, t in enumerate(kept)})
    small["merges"] = [m for m in merges if all(t in small["vocab"] for t in (*m, m[0] + m[1]))]
    return small


def tokenizer_json():
    for path in sorted((fixtures / "tokenizer/cases").glob("*.json")):
        case = json.loads(path.read_text())["tokenizer"]
        name = case["model"].pop("file")
        whole = path.stem in ("smollm", "llama2")
        small = shrunk(MODELS[name], 8, lambda t: whole and (len(t) == 1 or t.startswith("<0x")))
        case["model"] = small | case["model"]
        write("tokenizer_json_fuzz", path.stem, compact(case))


def text(value):
    return bytes([len(value)]) + value


def tokenizer_gguf():
    """the short form that tests/fuzz/tokenizer_gguf_fuzz.c turns into a GGUF image"""
    spm, bos, eos, prefix, collapse, all_bytes, types = (1 << i for i in range(7))
    names = ("default gpt-2 smollm llama-bpe dbrx glm4 qwen2 qwen35 minicpm5 seed-coder bailingmoe "
             "deepseek-llm deepseek-coder deepseek-v3 falcon tekken gpt-4o tiny_aya superbpe bloom "
             "viking gemma4").split()
    byte = shrunk(MODELS["byte"], 12, lambda t: False)
    tokens = b"".join(text(t.encode()) + bytes([3 if i < 3 else 1, 0])
                      for i, t in enumerate(byte["vocab"]))
    merges = b"".join(text(" ".join(m).encode()) for m in byte["merges"])
    for i, name in enumerate(names):
        flags = types | (bos if i % 2 else eos) | (prefix if i % 3 == 0 else 0)
        body = text(name.encode()) + tokens + b"\0" + merges + b"\0"
        write("tokenizer_gguf_fuzz", name, bytes([flags | (all_bytes if i % 4 else 0)]) + body)
    pieces = shrunk(MODELS["fallback"], 12, lambda t: False)["vocab"]
    kinds = [2, 3, 3] + [1, 1, 4, 1, 5] * 40
    tokens = b"".join(text(t.encode()) + bytes([kinds[i], 256 - min(i, 100) if i else 0])
                      for i, t in enumerate(pieces))
    for flags in (spm, spm | bos | prefix | types, spm | eos | collapse | all_bytes | types):
        write("tokenizer_gguf_fuzz", f"spm-{flags}", bytes([flags]) + text(b"default") + tokens + b"\0\0")


def tokenizer_text():
    for i, one in enumerate(TEXTS):
        data = bytes([i % TEXT_CASES]) + one.encode()
        write("tokenizer_text_fuzz", f"text-{i:02}", data)


def hf_config():
    for folder in sorted(path for path in (fixtures / "models").iterdir() if path.is_dir()):
        config = json.loads((folder / "config.json").read_text())
        config = config.get("text_config", config)
        generation = json.loads((folder / "generation_config.json").read_text())
        generation |= {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40,
                       "repetition_penalty": 1.1, "eos_token_id": [2, 3]}
        write("hf_config_fuzz", folder.name, compact(config) + b"\0" + compact(generation))
        rope = config.pop("rope_parameters")
        if "sliding_attention" in rope:
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        config["sliding_window"] = 4096
        write("hf_config_fuzz", folder.name + "-old", compact(config))


tokenizer_json()
tokenizer_gguf()
tokenizer_text()
hf_config()
