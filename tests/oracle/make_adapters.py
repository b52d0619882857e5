#!/usr/bin/env python3
"""Small adapters of every kind for the models of tests/fixtures/models, with PEFT's results.

  make_adapters.py [--out tests/fixtures/adapters] [NAME...]       all that are listed below, or those named

OUT/NAME gets adapter_config.json, adapter_model.safetensors (adapter.safetensors of AdapterHub's) and ref.bin, in the
form of make_references.py: vocab, n_layers, k = 0; its first prompt are 16 tokens with the logits of all positions and
the greedy continuation as the saved adapter gives them, loaded again, in f32; its second, where PEFT can merge the
adapter, the last four of these tokens with the logits of the merged model. Virtual tokens are no part of the prompt. A
folder with ref.bin alone is a mix of the others; MIXES says which.

Weights are random, none zero, and rounded to what the file holds. Two layouts are not PEFT's own: bottlenecks as the
PEFT of LLM-Adapters writes them (Hu et al. 2023), and as AdapterHub does (Houlsby et al. 2019, Pfeiffer et al. 2020, He
et al. 2021); neither package installs beside today's transformers, so that these are computed by the few lines of
Bottleneck below, from the published formulas. Experts with a LoRA each, named as before transformers 5, are written and
merged by hand; PEFT reads and converts some of them, and gives the results of these. Run from the source root with
setup_oracle.sh's Python."""
import argparse
import json
import pathlib
import shutil
import struct
import warnings
import zlib

import torch
from peft import (IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, VeraConfig,
                  get_peft_model)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.utils import logging

warnings.filterwarnings("ignore")
MODELS = pathlib.Path("tests/fixtures/models")
N_TOKENS, N_GREEDY, N_MERGED = 16, 8, 4
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def lora(**settings):
    return lambda: LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings))


def case(base, config, dtype="bf16", merge=True, invocation=None):
    return {"base": base, "config": config, "dtype": dtype, "merge": merge, "invocation": invocation}


# name: base, what PEFT is told, how the file holds its numbers
CASES = {
    "lora": case("yarn", lora(target_modules="all-linear")),
    "lora_f16": case("llama", lora(target_modules=["q_proj", "down_proj"], r=2, lora_alpha=3), "f16"),
    "rslora": case("linear", lora(target_modules=ATTENTION + ["up_proj"], use_rslora=True, r=5)),
    "patterns": case("yarn", lora(
        target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.gate_proj": 7, r"model\.layers\.[02]\.self_attn\.q_proj": 1, "down_proj": 3},
        alpha_pattern={"v_proj": 5, r".*layers\.(0|2)\.mlp\.down_proj": 11, "^model.layers.1.self_attn.q_proj": 2})),
    "some_layers": case("yarn", lora(target_modules=["o_proj", "up_proj"], layers_to_transform=[0, 2],
                                     layers_pattern="layers"), "f32"),
    "excluded": case("qwen3", lora(target_modules=r".*\.([qk]|up)_proj", r=2,
                                   exclude_modules=r".*layers\.1\..*")),
    "dora": case("yarn", lora(target_modules="all-linear", use_dora=True, r=3), "f32"),
    "dora_bias": case("linear", lora(target_modules=["k_proj", "o_proj", "down_proj"], use_dora=True, use_rslora=True)),
    "lora_bias": case("linear", lora(target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], lora_bias=True)),
    "bias_all": case("qwen2", lora(target_modules=["q_proj", "up_proj"], bias="all", r=2)),
    "bias_lora_only": case("linear", lora(target_modules=["k_proj", "o_proj", "gate_proj"], bias="lora_only")),
    "embeddings": case("yarn", lora(target_modules=["embed_tokens", "lm_head", "q_proj"])),
    # Merged, it would be merged into the head as well.
    "embeddings_tied": case("granite", lora(target_modules=["embed_tokens", "v_proj"]), merge=False),
    "saved": case("yarn", lora(target_modules=["v_proj"], modules_to_save=["lm_head", "embed_tokens", "norm",
                                                                           "input_layernorm"])),
    "saved_tied": case("smollm3", lora(target_modules=["up_proj"], modules_to_save=["embed_tokens"])),
    "saved_norms": case("gemma2", lora(target_modules=["q_proj", "o_proj"], modules_to_save=["pre_feedforward_layernorm"])),
    "ia3": case("yarn", lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"],
                                          feedforward_modules=["down_proj"], task_type="CAUSAL_LM"), "f32"),
    "ia3_outputs": case("yarn", lambda: IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[],
                                                  task_type="CAUSAL_LM")),
    "ia3_bias": case("linear", lambda: IA3Config(target_modules=["k_proj", "v_proj", "up_proj", "down_proj"],
                                                 feedforward_modules=["down_proj"], task_type="CAUSAL_LM")),
    "vera": case("yarn", lambda: VeraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=6, d_initial=0.3,
                                            task_type="CAUSAL_LM"), "f32"),
    "prompt_tuning": case("yarn", lambda: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"), "f32", False),
    "prompt_tuning_gemma": case("gemma2", lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "bf16",
                                False),
    "p_tuning": case("qwen3", lambda: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=24, task_type="CAUSAL_LM"),
                     "f32", False),
    "prefix_tuning": case("yarn", lambda: PrefixTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"), "bf16", False),
    "prefix_tuning_projected": case("phi3", lambda: PrefixTuningConfig(
        num_virtual_tokens=33, prefix_projection=True, encoder_hidden_size=20, task_type="CAUSAL_LM"), "f16", False),
    "alora": case("yarn", lora(target_modules=ATTENTION + MLP, alora_invocation_tokens=[17, 5, 9]), merge=False,
                  invocation=[17, 5, 9]),
    "phi3_fused": case("phi3", lora(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])),
    "phi3_dora": case("phi3", lora(target_modules=["qkv_proj", "gate_up_proj"], use_dora=True, r=2)),
    "phi3_ia3": case("phi3", lambda: IA3Config(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"],
                                               task_type="CAUSAL_LM")),
    "mla": case("deepseek_v2_group", lora(target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj",
                                                          *MLP], r=3)),
    "mla_direct": case("deepseek_v2", lora(target_modules=["q_proj", "kv_a_proj_with_mqa", "o_proj"], r=3)),
    "mla_kv_b": case("deepseek_v3", lora(target_modules=["q_b_proj", "kv_b_proj"], r=3)),
    "mla_dora": case("deepseek_v3", lora(target_modules=["q_a_proj", "kv_a_proj_with_mqa", "o_proj"], r=3, use_dora=True)),
    "experts_mixtral": case("mixtral_odd", lora(target_modules=["q_proj", "v_proj"], r=2, target_parameters=[
        "experts.gate_up_proj", "experts.down_proj"])),
    "experts_down": case("mixtral_odd", lora(target_modules=[], r=3, target_parameters=["experts.down_proj"])),
    "experts_qwen3_moe": case("qwen3_moe_odd", lora(target_modules=["k_proj"], r=3, use_rslora=True, target_parameters=[
        "experts.gate_up_proj", "gate.weight"])),
    "experts_qwen2_moe": case("qwen2_moe_sparse", lora(
        target_modules=["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate"],
        r=2, target_parameters=["experts.down_proj", "experts.gate_up_proj"])),
    "experts_qwen2_moe_dense": case("qwen2_moe", lora(
        target_modules=["o_proj", "down_proj"], r=2, target_parameters=["gate.weight"])),
    "experts_gpt_oss": case("gpt_oss", lora(target_modules=["q_proj", "o_proj"], r=2, target_parameters=[
        "experts.gate_up_proj", "experts.down_proj", "router.weight"])),
    "experts_gpt_oss_mxfp4": case("gpt_oss_mxfp4", lora(target_modules=["v_proj"], r=2, target_parameters=[
        "experts.gate_up_proj", "experts.down_proj"])),
    "experts_granitemoe": case("granitemoe", lora(target_modules=["q_proj"], r=2, target_parameters=[
        "experts.gate_up_proj", "experts.down_proj"])),
    "experts_deepseek_v3": case("deepseek_v3", lora(target_modules=["q_a_proj"], r=1, target_parameters=[
        "experts.gate_up_proj", "experts.down_proj", "gate.weight"])),
    "attention_glm4_moe": case("glm4_moe", lora(target_modules=["q_proj", "k_proj", "down_proj"], r=2)),
    "attention_llama4": case("llama4_standard", lora(target_modules=["q_proj", "k_proj", "o_proj"], r=2)),
}

# Adapters with a LoRA for each expert, named as before transformers 5: base, rank, alpha, the experts' parts (gate, up,
# down), other modules' last names, whether PEFT reads that, whether it is DoRA.
BY_EXPERT = {
    "by_expert_mixtral": ("mixtral_odd", 2, 3, ["w1", "w3", "w2"], ["gate"], True, False),
    "by_expert_qwen3_moe": ("qwen3_moe_odd", 3, 6, MLP, ["q_proj"], True, False),
    "by_expert_olmoe": ("olmoe_odd", 2, 4, MLP, ["gate", "o_proj"], True, False),
    "by_expert_qwen2_moe": ("qwen2_moe", 2, 4, MLP, [*MLP, "shared_expert_gate", "gate", "k_proj"], False, False),
    "by_expert_deepseek_v2": ("deepseek_v2_group", 1, 2, MLP, [*MLP, "kv_a_proj_with_mqa"], False, False),
    "by_expert_dora": ("olmoe_odd", 2, 4, MLP, ["v_proj"], False, True),
}

# name: base, (adapter, weight) ...: what each changes counts so much, y = y0 + sum of weight (y_i - y0)
MIXES = {
    "mix_lora": ("yarn", [("lora", 0.75), ("patterns", -0.5), ("some_layers", 1.25)]),
    "mix_kinds": ("yarn", [("dora", 0.5), ("ia3_outputs", 0.75), ("vera", -0.25), ("bottleneck_parallel", 0.5)]),
}

# name: base, how the adapter lies, its size, activation, scaling, the modules; "hub" says where AdapterHub puts it.
BOTTLENECKS = {
    "bottleneck_parallel": ("yarn", {"bottleneck_size": 5, "non_linearity": "tanh", "use_parallel_adapter": True, "scaling": 1.5,
                                     "target_modules": ["q_proj", "up_proj", "down_proj"]}),
    "bottleneck_series": ("yarn", {"bottleneck_size": 4, "non_linearity": "relu", "use_parallel_adapter": False, "scaling": 1.0,
                                   "target_modules": ["down_proj"]}),
    "bottleneck_before": ("yarn", {"bottleneck_size": 3, "non_linearity": "gelu", "use_parallel_adapter": False, "scaling": 1.0,
                                   "target_modules": ["gate_proj", "down_proj"]}),
    "hub_houlsby": ("yarn", {"mh_adapter": True, "output_adapter": True, "non_linearity": "swish", "reduction_factor": 16,
                             "original_ln_before": False, "is_parallel": False, "scaling": 1.0}),
    "hub_pfeiffer": ("yarn", {"mh_adapter": False, "output_adapter": True, "non_linearity": "relu", "reduction_factor": 20,
                              "original_ln_before": True, "is_parallel": False, "scaling": 1.0}),
    "hub_parallel": ("yarn", {"mh_adapter": False, "output_adapter": True, "non_linearity": "relu", "reduction_factor": 12,
                              "original_ln_before": False, "is_parallel": True, "scaling": 4.0}),
}


def noise(name, shape, scale=1.0):
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator) * scale


def base_model(name):
    kind = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
    if json.loads((MODELS / name / "config.json").read_text()).get("quantization_config"):
        from transformers import Mxfp4Config
        kind["quantization_config"] = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(MODELS / name, **kind).float().eval()


def prompt(vocab, invocation):
    ids = [(i * 37 + 11) % vocab for i in range(N_TOKENS)]
    if invocation:  # twice, since the last counts
        ids[1:1 + len(invocation)] = ids[7:7 + len(invocation)] = invocation
    return ids


def logits_of(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=True).logits[0, -len(ids):].float()


def write_reference(folder, model, ids, merged=None):
    logits, more, margins = logits_of(model, ids), [], []
    for _ in range(N_GREEDY):
        best, at = logits_of(model, ids + more)[-1].topk(2)
        more.append(int(at[0]))
        margins.append(float(best[0] - best[1]))
    config = model.config.get_text_config()
    with open(folder / "ref.bin", "wb") as f:
        f.write(b"CREF" + struct.pack("<5I", 1, logits.shape[1], config.num_hidden_layers, 0, 1 + (merged is not None)))
        f.write(struct.pack(f"<{1 + len(ids)}I", len(ids), *ids) + logits.numpy().astype("<f4").tobytes())
        f.write(struct.pack(f"<{1 + len(more)}I", len(more), *more) + struct.pack(f"<{len(margins)}f", *margins))
        if merged is not None:
            last = ids[-N_MERGED:]
            f.write(struct.pack(f"<{1 + len(last)}I", len(last), *last))
            f.write(merged[-N_MERGED:].numpy().astype("<f4").tobytes() + struct.pack("<I", 0))
    return logits


def share(a, b):
    return float((a - b).abs().max() / b.abs().max())


def report(name, base, ids, logits, merged, folder):
    change = share(logits, logits_of(base_model(base), ids))
    assert change > 0.02, f"{name} changes the logits by {change} only"
    text = f"{name:24} {base:18} changes {change:.2f} of the largest"
    if merged is not None:
        error = share(merged, logits)
        text += f", merged differ by {error:.1e}"
        assert error < 1e-3, text
    print(f"{text}, {sum(f.stat().st_size for f in folder.iterdir()) / 1e3:.0f} kB", flush=True)


def randomise(model):
    """Of A about what keeps lengths, of B less, so that an adapter bends the model and does not break it."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            plain = name.replace(".default", "")
            if "magnitude" in name or "ia3_" in name or "vera_lambda_d" in name or "norm" in plain.split(".")[-2]:
                p.mul_(1 + noise(plain, p.shape, 0.2))
                if "ia3_" in name:
                    p.copy_(1 + noise(plain, p.shape, 0.3))
            elif "vera_lambda_b" in name:
                p.copy_(noise(plain, p.shape, 0.5))
            elif "lora_A" in name or "embedding_B" in name:
                p.copy_(noise(plain, p.shape, p.shape[-1] ** -0.5))
            elif "lora_B" in name or "embedding_A" in name:
                p.copy_(noise(plain, p.shape, 0.15))
            elif "prompt_encoder" in name:
                p.copy_(noise(plain, p.shape, 0.4))
            else:
                p.add_(noise(plain, p.shape, 0.1 * float(p.std()) + 0.02))


def tidy(folder, base, dtype):
    """What the file holds, and no path of the machine that made it."""
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(MODELS / base)
    for key in ("target_modules", "target_parameters", "feedforward_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    (folder / "README.md").unlink(missing_ok=True)


def load(base, folder):
    return PeftModel.from_pretrained(base_model(base), folder).eval()


def finish(name, base, folder, merge, invocation=None):
    ids = prompt(base_model(base).config.get_text_config().vocab_size, invocation)
    merged = logits_of(load(base, folder).merge_and_unload(), ids) if merge else None
    logits = write_reference(folder, load(base, folder), ids, merged)
    report(name, base, ids, logits, merged, folder)


def make_case(name, folder):
    c = CASES[name]
    model = get_peft_model(base_model(c["base"]), c["config"]())
    randomise(model)
    model.save_pretrained(folder)
    tidy(folder, c["base"], c["dtype"])
    finish(name, c["base"], folder, c["merge"], c["invocation"])


def modules_by_expert(model, parts, others):
    """The matrices of the wanted modules by their former names, as views of the parameters."""
    found = {}
    for name, p in model.named_parameters():
        owner, leaf = name.rsplit(".", 1)
        old = owner.replace(".mlp", ".block_sparse_moe") if parts[0] == "w1" else owner
        for e in range(p.shape[0] if p.dim() == 3 else 0):
            if leaf == "gate_up_proj":
                found[f"{old}.{e}.{parts[0]}"], found[f"{old}.{e}.{parts[1]}"] = p.data[e].chunk(2)
            else:
                found[f"{old}.{e}.{parts[2]}"] = p.data[e]
        if p.dim() == 2 and leaf == "weight" and owner.split(".")[-1] in others:
            found[old] = p.data
    return found


def make_by_expert(name, folder):
    base, rank, alpha, parts, others, by_peft, dora = BY_EXPERT[name]
    merged, tensors = base_model(base), {}
    for module, weight in modules_by_expert(merged, parts, others).items():
        at = f"base_model.model.{module}.lora_"
        a = noise(at + "A", (rank, weight.shape[1]), weight.shape[1] ** -0.5).bfloat16()
        b = noise(at + "B", (weight.shape[0], rank), 0.25).bfloat16()
        weight += alpha / rank * b.float() @ a.float()
        tensors |= {at + "A.weight": a, at + "B.weight": b}
        if dora:
            norms = weight.norm(dim=1)
            m = (norms * (1 + noise(at + "m", norms.shape, 0.2))).bfloat16()
            weight *= (m.float() / norms)[:, None]
            tensors[at + "magnitude_vector"] = m
    LoraConfig(r=rank, lora_alpha=alpha, use_dora=dora, target_modules=[*parts, *others], task_type="CAUSAL_LM",
               inference_mode=True).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    tidy(folder, base, "bf16")
    ids = prompt(merged.config.vocab_size, None)
    by_hand = logits_of(merged, ids)
    report(name, base, ids, write_reference(folder, load(base, folder) if by_peft else merged, ids, by_hand), by_hand, folder)


class Bottleneck(torch.nn.Module):
    """s B f(A x + a) + s b; LLM-Adapters' have no a and b."""

    def __init__(self, weights, act, scaling):
        super().__init__()
        self.weights, self.act, self.scaling = weights, ACT2FN[act], scaling

    def forward(self, x):
        w = {key: value.float() for key, value in self.weights.items()}
        z = torch.nn.functional.linear(x, w["down"], w.get("down_bias"))
        return self.scaling * torch.nn.functional.linear(self.act(z), w["up"], w.get("up_bias"))


def hook(module, adapter, where):
    """parallel: W x + f(x); series: y + f(y); before: W (x + f(x))."""
    if where == "before":
        module.register_forward_pre_hook(lambda _, args: (args[0] + adapter(args[0]),))
    else:
        module.register_forward_hook(lambda _, args, y: y + adapter(args[0] if where == "parallel" else y))


def llm_adapters(name, model, settings, tensors):
    """LLM-Adapters' peft/tuners/bottleneck.py: down_proj's is behind it, gate_proj's and up_proj's before them."""
    for path, module in list(model.named_modules()):
        leaf = path.split(".")[-1]
        if leaf not in settings["target_modules"]:
            continue
        where = "parallel" if settings["use_parallel_adapter"] else "series" if leaf == "down_proj" else "before"
        cols = module.out_features if where == "series" else module.in_features
        rows = module.in_features if where == "before" else module.out_features
        n = settings["bottleneck_size"]
        w = {"down": noise(name + path, (n, cols), cols ** -0.5).bfloat16(),
             "up": noise(path + name, (rows, n), 0.25).bfloat16()}
        tensors |= {f"base_model.model.{path}.adapter_{key}.weight": value for key, value in w.items()}
        hook(module, Bottleneck(w, settings["non_linearity"], settings["scaling"]), where)
    return {"peft_type": "BOTTLENECK", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none", "adapter_dropout": 0.0,
            "init_weights": "bert", "modules_to_save": None} | settings


def hub(name, model, settings, tensors):
    """AdapterHub's methods/bottleneck.py and modeling.py for a llama, whose blocks have no norm behind them: with h
    the block's output and r the residual stream, the sum becomes r + h + f(h), with original_ln_before
    r + h + f(r + h), and where it is parallel r + h + f(r)."""
    hidden = model.config.hidden_size
    for i, layer in enumerate(model.model.layers):
        for part, wanted, block, before in (("attention_adapters", "mh_adapter", layer.self_attn, layer.input_layernorm),
                                            ("output_adapters", "output_adapter", layer.mlp, layer.post_attention_layernorm)):
            if not settings[wanted]:
                continue
            at, n = f"model.layers.{i}.{part}.adapters.{name}.adapter_", hidden // settings["reduction_factor"]
            w = {"down": noise(at + "d", (n, hidden), hidden ** -0.5), "down_bias": noise(at + "db", (n,), 0.1),
                 "up": noise(at + "u", (hidden, n), 0.2), "up_bias": noise(at + "ub", (hidden,), 0.1)}
            w = {key: value.bfloat16() for key, value in w.items()}
            tensors |= {at + "down.0.weight": w["down"], at + "down.0.bias": w["down_bias"],
                        at + "up.weight": w["up"], at + "up.bias": w["up_bias"]}
            adapter, residual = Bottleneck(w, settings["non_linearity"].replace("swish", "silu"), settings["scaling"]), {}
            before.register_forward_pre_hook(lambda _, args, residual=residual: residual.update(r=args[0]) or None)

            def add(_, args, output, adapter=adapter, residual=residual):
                h = output[0] if isinstance(output, tuple) else output
                z = residual["r"] if settings["is_parallel"] else h + residual["r"] if settings["original_ln_before"] else h
                return (h + adapter(z), *output[1:]) if isinstance(output, tuple) else h + adapter(z)

            block.register_forward_hook(add)
    inner = {"adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "init_weights": "bert", "inv_adapter": None,
             "leave_out": [], "ln_after": False, "ln_before": False, "original_ln_after": True, "phm_layer": False,
             "residual_before_ln": True, "stochastic_depth": 0.0, "use_gating": False, "architecture": None}
    return {"config": inner | settings, "hidden_size": hidden, "model_class": "LlamaForCausalLM",
            "model_type": "llama", "name": name, "version": "adapters.1.2.0"}


def make_bottleneck(name, folder):
    base, settings = BOTTLENECKS[name]
    model, tensors = base_model(base), {}
    by_hub = "mh_adapter" in settings
    config = (hub if by_hub else llm_adapters)(name, model, settings, tensors)
    config["model_name" if by_hub else "base_model_name_or_path"] = str(MODELS / base)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    save_file({key: value.contiguous() for key, value in tensors.items()},
              folder / ("adapter.safetensors" if by_hub else "adapter_model.safetensors"), metadata={"format": "pt"})
    ids = prompt(model.config.vocab_size, None)
    report(name, base, ids, write_reference(folder, model, ids), None, folder)


def adapted(base, out, name):
    if name not in BOTTLENECKS:
        return load(base, out / name).base_model.model
    model = base_model(base)
    llm_adapters(name, model, BOTTLENECKS[name][1], {})
    return model


def make_mix(name, folder):
    """Each linear module as each adapter has it, beside the base's. Of plain LoRAs PEFT's concatenation is the same."""
    base, uses = MIXES[name]
    model, out = base_model(base), folder.parent
    others = [(adapted(base, out, adapter), weight) for adapter, weight in uses]
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parts = [(other.get_submodule(path), weight) for other, weight in others]
            module.register_forward_hook(lambda _, args, y, parts=parts: y + sum(w * (m(args[0]) - y) for m, w in parts))
    ids = prompt(model.config.vocab_size, None)
    merged = None
    if all(adapter in CASES and isinstance(CASES[adapter]["config"](), LoraConfig) for adapter, _ in uses):
        joined = PeftModel.from_pretrained(base_model(base), out / uses[0][0], adapter_name="0")
        for i, (adapter, _) in enumerate(uses[1:]):
            joined.load_adapter(out / adapter, adapter_name=str(i + 1))
        joined.add_weighted_adapter([str(i) for i in range(len(uses))], [w for _, w in uses], "sum", combination_type="cat")
        joined.set_adapter("sum")
        merged = logits_of(joined.eval(), ids)
    report(name, base, ids, write_reference(folder, model, ids, merged), merged, folder)


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/fixtures/adapters"))
    parser.add_argument("names", nargs="*")
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    makers = {**dict.fromkeys(CASES, make_case), **dict.fromkeys(BY_EXPERT, make_by_expert),
              **dict.fromkeys(BOTTLENECKS, make_bottleneck), **dict.fromkeys(MIXES, make_mix)}
    for name in a.names or makers:
        shutil.rmtree(a.out / name, ignore_errors=True)
        (a.out / name).mkdir(parents=True)
        makers[name](name, a.out / name)


if __name__ == "__main__":
    main()
