"""Writes a tiny random model as a Hugging Face folder: weights, config, tokenizer, chat template."""
import json
import pathlib
import random
import struct

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 32, 2, 4, 2, 64
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_characters():
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(extra)) for b in range(256)]


def tokenizer():
    special = ["<|im_start|>", "<|im_end|>"]
    vocab = {c: i for i, c in enumerate(special + byte_characters())}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, t in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": [f"{a} {b}" for a, b in merges]},
    }


def tensors(vocab, experts):
    head = HIDDEN // HEADS
    yield "model.embed_tokens.weight", (vocab, HIDDEN)
    yield "lm_head.weight", (vocab, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        yield at + "input_layernorm.weight", (HIDDEN,)
        yield at + "post_attention_layernorm.weight", (HIDDEN,)
        yield at + "self_attn.q_proj.weight", (HEADS * head, HIDDEN)
        yield at + "self_attn.k_proj.weight", (KV_HEADS * head, HIDDEN)
        yield at + "self_attn.v_proj.weight", (KV_HEADS * head, HIDDEN)
        yield at + "self_attn.o_proj.weight", (HIDDEN, HEADS * head)
        if experts == 0:
            yield at + "mlp.gate_proj.weight", (FFN, HIDDEN)
            yield at + "mlp.up_proj.weight", (FFN, HIDDEN)
            yield at + "mlp.down_proj.weight", (HIDDEN, FFN)
            continue
        yield at + "block_sparse_moe.gate.weight", (experts, HIDDEN)
        for e in range(experts):
            yield at + f"block_sparse_moe.experts.{e}.w1.weight", (FFN, HIDDEN)
            yield at + f"block_sparse_moe.experts.{e}.w3.weight", (FFN, HIDDEN)
            yield at + f"block_sparse_moe.experts.{e}.w2.weight", (HIDDEN, FFN)


def write_tensors(path, named):
    """A safetensors file of f32 tensors: (name, shape, values)."""
    header, data = {}, bytearray()
    for name, shape, values in named:
        raw = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_adapter(folder, scale=1.0, rank=2, seed=9):
    """A LoRA adapter on the MLP; scale 0 changes nothing."""
    folder.mkdir()
    chance = random.Random(seed)
    named = []
    for i in range(LAYERS):
        for part, n_in, n_out in (("gate_proj", HIDDEN, FFN), ("up_proj", HIDDEN, FFN), ("down_proj", FFN, HIDDEN)):
            at = f"base_model.model.model.layers.{i}.mlp.{part}.lora_"
            named.append((at + "A.weight", (rank, n_in), [chance.gauss(0, 0.1) for _ in range(rank * n_in)]))
            named.append((at + "B.weight", (n_out, rank), [scale * chance.gauss(0, 0.1) for _ in range(rank * n_out)]))
    write_tensors(folder / "adapter_model.safetensors", named)
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
         "target_modules": ["gate_proj", "up_proj", "down_proj"], "base_model_name_or_path": "tiny"}))


def write(folder, experts=0, context=4096):
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    words = tokenizer()
    vocab = len(words["model"]["vocab"])
    config = {
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if experts else "llama", "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": FFN,
        "vocab_size": vocab, "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 0,
        "eos_token_id": 1,
    }
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    chance = random.Random(5)
    named = []
    for name, shape in tensors(vocab, experts):
        n = shape[0] * (shape[1] if len(shape) == 2 else 1)
        named.append((name, shape, [1.0] * n if len(shape) == 1 else [chance.gauss(0, 0.25) for _ in range(n)]))
    write_tensors(folder / "model.safetensors", named)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE,
         "tokenizer_class": "PreTrainedTokenizerFast"}))
    return vocab
