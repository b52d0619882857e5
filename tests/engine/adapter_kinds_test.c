/* Adapters of other kinds than PEFT's LoRA, read in the base's terms: IA3, VeRA, virtual tokens,
 * bottlenecks, modules that are saved whole; and GGUF LoRA files. */
#include "tests/engine/adapter_case.h"

#include <math.h>

/* -- saved whole -- */

#define SAVED(modules)                                                                             \
    "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, \"modules_to_save\": [" modules "]}"

static void saved_modules_take_the_bases_place(void **state)
{
    (void)state;
    adapter_image image = {0};
    image_add(&image, "base_model.model.model.norm.weight", 64, 0, 0);
    image_add(&image, LAYERS "1.post_attention_layernorm.weight", 64, 0, 0);
    image_add(&image, LAYERS "1.self_attn.k_proj.weight", 32, 64, 0);
    image_add(&image, LAYERS "1.mlp.down_proj.weight", 64, 160, 0);
    image_add(&image, "base_model.model.lm_head.weight", 512, 64, 0);
    static const char *const models[] = {"llama", "llama.gguf"};
    for (size_t m = 0; m < 2; m++) {
        choir_adapter_data *d =
            reads(models[m], SAVED("\"norm\", \"k_proj\", \"mlp\", \"lm_head\""), &image);
        assert_int_equal(d->n_changes, 5);
        assert_int_equal(d->max_rank, 0);
        const choir_adapter_change *norm = find_change(d, CHOIR_ROLE_OUTPUT_NORM, 0, 0);
        assert_true(norm->rows == 1 && norm->cols == 64 && norm->has == CHOIR_ADAPTER_HAS_WEIGHT);
        same_numbers(norm->weight, 64, 0, 0);
        same_numbers(find_change(d, CHOIR_ROLE_FFN_NORM, 1, 0)->weight, 64, 1, 0);
        const float *k = find_change(d, CHOIR_ROLE_ATTN_K, 1, 0)->weight;
        for (uint32_t r = 0; r < 32; r++)
            same_numbers(k + 64 * (size_t)r, 64, 2, 64 * (size_t)(m == 0 ? r : half_of(r, 16)));
        same_numbers(find_change(d, CHOIR_ROLE_FFN_DOWN, 1, 0)->weight, 64 * 160, 3, 0);
        same_numbers(find_change(d, CHOIR_ROLE_HEAD, 0, 0)->weight, 512 * 64, 4, 0);
        choir_adapter_data_free(d);
    }
    refuses("llama", SAVED("\"norm\", \"k_proj\", \"lm_head\""), &image, CHOIR_E_INVALID,
            "1.mlp.down_proj.weight");
    refuses("qwen2_moe", SAVED("\"norm\", \"k_proj\", \"mlp\", \"lm_head\""), &image,
            CHOIR_E_INVALID, "the base wants");
    image_free(&image);
}

/* A folder of Gemma has its norms less 1; the base has them whole, and an adapter's are made so. */
static void norms_less_one_are_made_whole(void **state)
{
    (void)state;
    adapter_image image = {0};
    image_add(&image, LAYERS "2.post_feedforward_layernorm.weight", 60, 0, 0);
    static const char *const models[] = {"gemma2", "gemma2.gguf"};
    for (size_t m = 0; m < 2; m++) {
        choir_adapter_data *d = reads(models[m], SAVED("\"post_feedforward_layernorm\""), &image);
        const float *w = find_change(d, CHOIR_ROLE_FFN_POST_NORM, 2, 0)->weight;
        for (size_t i = 0; i < 60; i++) assert_true(w[i] == image_value(0, i) + 1);
        choir_adapter_data_free(d);
    }
    image_free(&image);
}

static void saved_experts_are_taken_apart(void **state)
{
    (void)state;
    adapter_image image = {0};
    image_add(&image, LAYERS "0.mlp.experts.gate_up_proj", 8, 192, 64);
    image_add(&image, LAYERS "0.mlp.experts.down_proj", 8, 64, 96);
    choir_adapter_data *d = reads("mixtral", SAVED("\"experts\""), &image);
    assert_int_equal(d->n_changes, 24);
    same_numbers(find_change(d, CHOIR_ROLE_EXPERT_GATE, 0, 5)->weight, 96 * 64, 0, 5 * 192 * 64);
    same_numbers(find_change(d, CHOIR_ROLE_EXPERT_UP, 0, 5)->weight, 96 * 64, 0,
                 (5 * 192 + 96) * 64);
    same_numbers(find_change(d, CHOIR_ROLE_EXPERT_DOWN, 0, 7)->weight, 64 * 96, 1, 7 * 64 * 96);
    choir_adapter_data_free(d);
    image_free(&image);
    /* gpt-oss: [inputs, outputs], gate and up by turns. */
    image_add(&image, LAYERS "0.mlp.experts.gate_up_proj", 5, 64, 64);
    image_add(&image, LAYERS "0.mlp.experts.gate_up_proj_bias", 5, 64, 0);
    d = reads("gpt_oss_mxfp4", SAVED("\"experts\""), &image);
    const choir_adapter_change *up = find_change(d, CHOIR_ROLE_EXPERT_UP, 0, 3);
    assert_int_equal(up->has, CHOIR_ADAPTER_HAS_WEIGHT | CHOIR_ADAPTER_HAS_BIAS);
    for (uint32_t r = 0; r < 32; r++) {
        same_numbers(up->bias + r, 1, 1, 3 * 64 + 2 * (size_t)r + 1);
        for (uint32_t i = 0; i < 64; i++)
            same_numbers(up->weight + 64 * (size_t)r + i, 1, 0, (3 * 64 + i) * 64 + 2 * r + 1);
    }
    choir_adapter_data_free(d);
    image_free(&image);
}

static void biases_of_the_base_are_replaced(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.q_proj", 2, 64, 64);
    image_add(&image, LAYERS "0.self_attn.q_proj.base_layer.bias", 64, 0, 0);
    image_add(&image, LAYERS "0.self_attn.v_proj.bias", 32, 0, 0);
#define BIAS(kind) "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, \"bias\": \"" kind "\"}"
    choir_adapter_data *d = reads("qwen2", BIAS("all"), &image);
    assert_int_equal(d->n_changes, 2);
    const choir_adapter_change *q = find_change(d, CHOIR_ROLE_ATTN_Q, 0, 0);
    assert_int_equal(q->has, CHOIR_ADAPTER_HAS_LOW_RANK | CHOIR_ADAPTER_HAS_BIAS);
    assert_true(q->rank == 2 && q->scale == 3);
    same_numbers(q->bias, 64, 2, 0);
    same_numbers(find_change(d, CHOIR_ROLE_ATTN_V, 0, 0)->bias, 32, 3, 0);
    choir_adapter_data_free(d);
    refuses("qwen2", BIAS("none"), &image, CHOIR_E_INVALID, "q_proj.base_layer.bias");
    refuses("llama", BIAS("all"), &image, CHOIR_E_INVALID, "ATTN_Q_BIAS");
    image_add(&image, LAYERS "0.self_attn.q_proj.bias", 64, 0, 0);
    refuses("qwen2", BIAS("lora_only"), &image, CHOIR_E_INVALID, "say the same of ATTN_Q");
    image_free(&image);
}

/* -- vectors -- */

#define IA3(modules)                                                                               \
    "{\"peft_type\": \"IA3\", \"target_modules\": [\"x\"], \"feedforward_modules\": " modules "}"

static void ia3_scales_outputs_and_inputs(void **state)
{
    (void)state;
    static const char *const lists[] = {IA3("[\"down_proj\"]"), IA3("\".*down_proj\""),
                                        IA3("[\"n_proj\"]")};
    adapter_image image = {0};
    image_add(&image, LAYERS "0.self_attn.k_proj.ia3_l", 32, 1, 0);
    image_add(&image, LAYERS "0.mlp.down_proj.ia3_l", 1, 160, 0);
    for (size_t i = 0; i < 3; i++) {
        choir_adapter_data *d = reads("llama.gguf", lists[i], &image);
        assert_string_equal(d->kind, "IA3");
        const choir_adapter_change *k = find_change(d, CHOIR_ROLE_ATTN_K, 0, 0);
        assert_true(k->rank == 0 && k->has == CHOIR_ADAPTER_HAS_OUT_SCALE);
        for (uint32_t r = 0; r < 32; r++) same_numbers(k->out_scale + r, 1, 0, half_of(r, 16));
        const choir_adapter_change *down = find_change(d, CHOIR_ROLE_FFN_DOWN, 0, 0);
        assert_int_equal(down->has, CHOIR_ADAPTER_HAS_IN_SCALE);
        same_numbers(down->in_scale, 160, 1, 0);
        choir_adapter_data_free(d);
    }
    refuses("llama", IA3("\"down_proj\""), &image, CHOIR_E_INVALID,
            "has shape [1, 160], the base wants [64, 1]");
    refuses("llama", IA3("7"), &image, CHOIR_E_FORMAT, "feedforward_modules");
    refuses("llama", IA3("\"(\""), &image, CHOIR_E_FORMAT, "no regular expression");
    image_add(&image, LAYERS "0.mlp.down_proj.ia3_m", 1, 160, 0);
    refuses("llama", IA3("[\"down_proj\"]"), &image, CHOIR_E_INVALID, "ia3_m");
    image_free(&image);
    image_add(&image, LAYERS "0.self_attn.qkv_proj.ia3_l", 80, 1, 0);
    choir_adapter_data *d = reads("phi3", IA3("null"), &image);
    same_numbers(find_change(d, CHOIR_ROLE_ATTN_V, 0, 0)->out_scale, 16, 0, 64);
    choir_adapter_data_free(d);
    image_free(&image);
}

static void vera_is_folded(void **state)
{
    (void)state;
    static const char *const config = "{\"peft_type\": \"VERA\", \"r\": 3}";
    adapter_image image = {0};
    image_add(&image, "base_model.vera_A", 3, 160, 0);
    image_add(&image, "base_model.vera_B", 64, 3, 0);
    image_add(&image, LAYERS "0.self_attn.k_proj.vera_lambda_d", 3, 0, 0);
    image_add(&image, LAYERS "0.self_attn.k_proj.vera_lambda_b", 32, 0, 0);
    image_add(&image, LAYERS "0.mlp.down_proj.vera_lambda_d", 3, 0, 0);
    image_add(&image, LAYERS "0.mlp.down_proj.vera_lambda_b", 64, 0, 0);
    choir_adapter_data *d = reads("llama.gguf", config, &image);
    assert_string_equal(d->kind, "VeRA");
    const choir_adapter_change *c = find_change(d, CHOIR_ROLE_ATTN_K, 0, 0);
    assert_true(c->rank == 3 && c->scale == 1 && c->cols == 64);
    for (uint32_t k = 0; k < 3; k++) {
        for (uint32_t i = 0; i < 64; i++) /* the first columns of the larger A */
            assert_true(c->a[64 * k + i] == image_value(2, k) * image_value(0, 160 * k + i));
        for (uint32_t r = 0; r < 32; r++) {
            uint32_t from = half_of(r, 16);
            assert_true(c->b[3 * r + k] == image_value(3, from) * image_value(1, 3 * from + k));
        }
    }
    choir_adapter_data_free(d);
    snprintf(image.tensors[5].name, IMAGE_MAX_NAME, LAYERS "0.mlp.down_proj.vera_lambda_c");
    refuses("llama", config, &image, CHOIR_E_INVALID, "no vera_lambda_b beside it");
    snprintf(image.tensors[5].name, IMAGE_MAX_NAME, LAYERS "0.mlp.down_proj.vera_lambda_b");
    snprintf(image.tensors[4].name, IMAGE_MAX_NAME, LAYERS "0.mlp.up_proj.vera_lambda_d");
    snprintf(image.tensors[5].name, IMAGE_MAX_NAME, LAYERS "0.mlp.up_proj.vera_lambda_b");
    refuses("llama", config, &image, CHOIR_E_INVALID, "up_proj");
    refuses("llama", "{\"peft_type\": \"VERA\", \"r\": 4}", &image, CHOIR_E_INVALID, "[4, 160]");
    refuses("llama", "{\"peft_type\": \"VERA\", \"r\": 0}", &image, CHOIR_E_INVALID, "r is 0");
    snprintf(image.tensors[1].name, IMAGE_MAX_NAME, "base_model.vera_C");
    refuses("llama", config, &image, CHOIR_E_UNIMPLEMENTED, "save_projection");
    image_free(&image);
}

/* -- virtual tokens -- */

static void prompts_are_rows_of_the_table(void **state)
{
    (void)state;
    static const char *const config =
        "{\"peft_type\": \"PROMPT_TUNING\", \"num_virtual_tokens\": 5, "
        "\"num_transformer_submodules\": 1}";
    adapter_image image = {0};
    image_add(&image, "prompt_embeddings", 5, 64, 0);
    choir_adapter_data *d = reads("llama", config, &image);
    assert_string_equal(d->kind, "prompt tuning");
    assert_true(d->n_virtual == 5 && d->n_changes == 0 && d->virtual_keys == NULL);
    same_numbers(d->virtual_embeddings, 5 * 64, 0, 0);
    choir_adapter_data_free(d);
    d = reads("llama", "{\"peft_type\": \"P_TUNING\", \"num_virtual_tokens\": 5}", &image);
    assert_string_equal(d->kind, "p-tuning");
    choir_adapter_data_free(d);
#define PROMPT(settings) "{\"peft_type\": \"PROMPT_TUNING\", " settings "}"
    refuses("llama", PROMPT("\"num_virtual_tokens\": 4"), &image, CHOIR_E_INVALID, "[4, 64]");
    refuses("llama", PROMPT("\"num_virtual_tokens\": 0"), &image, CHOIR_E_INVALID, "is 0");
    refuses("llama", PROMPT("\"num_virtual_tokens\": 1e30"), &image, CHOIR_E_INVALID, "1e+30");
    refuses("llama", PROMPT("\"num_virtual_tokens\": \"5\""), &image, CHOIR_E_FORMAT,
            "num_virtual_tokens");
    refuses("llama", PROMPT("\"num_virtual_tokens\": 5, \"num_transformer_submodules\": 2"), &image,
            CHOIR_E_UNIMPLEMENTED, "num_transformer_submodules");
    image_add(&image, "another", 5, 64, 0);
    refuses("llama", config, &image, CHOIR_E_INVALID, "another");
    image_free(&image);
    image_add(&image, "prompt_embedding", 5, 64, 0);
    refuses("llama", config, &image, CHOIR_E_INVALID, "'prompt_embeddings' is missing");
    image_free(&image);
    /* Gemma's table multiplies what it gives; prompts come behind it. */
    image_add(&image, "prompt_embeddings", 5, 60, 0);
    d = reads("gemma2", config, &image);
    float scale = base_of("gemma2")->embedding_scale;
    assert_true(scale > 7);
    for (size_t i = 0; i < 300; i++)
        assert_true(d->virtual_embeddings[i] == image_value(0, i) / scale);
    choir_adapter_data_free(d);
    image_free(&image);
}

static void prefixes_are_keys_and_values_of_every_layer(void **state)
{
    (void)state;
    static const char *const config =
        "{\"peft_type\": \"PREFIX_TUNING\", \"num_virtual_tokens\": 5, "
        "\"num_attention_heads\": 2, \"token_dim\": 32}";
    adapter_image image = {0};
    image_add(&image, "prompt_embeddings", 5, 3 * 2 * 32, 0);
    static const char *const models[] = {"llama", "llama.gguf"};
    for (size_t m = 0; m < 2; m++) {
        choir_adapter_data *d = reads(models[m], config, &image);
        assert_string_equal(d->kind, "prefix tuning");
        assert_true(d->n_virtual == 5 && d->virtual_embeddings == NULL);
        for (size_t l = 0; l < 3; l++)
            for (size_t v = 0; v < 5; v++)
                for (uint32_t i = 0; i < 32; i++) {
                    size_t at = (v * 3 + l) * 64, to = (l * 5 + v) * 32 + i;
                    same_numbers(d->virtual_keys + to, 1, 0, at + (m == 0 ? i : half_of(i, 16)));
                    same_numbers(d->virtual_values + to, 1, 0, at + 32 + i);
                }
        choir_adapter_data_free(d);
    }
    refuses("llama",
            "{\"peft_type\": \"PREFIX_TUNING\", \"num_virtual_tokens\": 5, "
            "\"num_attention_heads\": 4}",
            &image, CHOIR_E_INVALID, "num_attention_heads");
    refuses("qwen3", config, &image, CHOIR_E_INVALID, "the base wants");
    refuses("deepseek_v3", config, &image, CHOIR_E_UNIMPLEMENTED, "latents");
    image_free(&image);
}

/* -- bottlenecks -- */

static void add_bottleneck(adapter_image *image, const char *module, const char *down,
                           uint64_t width, uint64_t in, uint64_t out)
{
    char name[160];
    snprintf(name, sizeof name, "%s.%s.weight", module, down);
    image_add(image, name, width, in, 0);
    snprintf(name, sizeof name, "%s.%s.bias", module, down);
    image_add(image, name, width, 0, 0);
    snprintf(name, sizeof name, "%s.adapter_up.weight", module);
    image_add(image, name, out, width, 0);
    snprintf(name, sizeof name, "%s.adapter_up.bias", module);
    image_add(image, name, out, 0, 0);
}

#define BOTTLENECK(settings) "{\"peft_type\": \"BOTTLENECK\", \"bottleneck_size\": 6, " settings "}"

static void bottlenecks_lie_beside_or_behind(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_bottleneck(&image, LAYERS "1.mlp.down_proj", "adapter_down", 6, 160, 64);
    choir_adapter_data *d =
        reads("llama",
              BOTTLENECK("\"use_parallel_adapter\": true, \"non_linearity\": \"tanh\", "
                         "\"scaling\": 0.5"),
              &image);
    const choir_adapter_change *c = find_change(d, CHOIR_ROLE_FFN_DOWN, 1, 0);
    assert_string_equal(d->kind, "bottleneck");
    assert_true(c->rank == 6 && c->scale == 0.5F && c->act == CHOIR_ADAPTER_TANH && !c->series);
    assert_int_equal(c->has, CHOIR_ADAPTER_HAS_LOW_RANK | CHOIR_ADAPTER_HAS_A_BIAS |
                                 CHOIR_ADAPTER_HAS_B_BIAS);
    same_numbers(c->a, 6 * 160, 0, 0);
    same_numbers(c->a_bias, 6, 1, 0);
    same_numbers(c->b, 64 * 6, 2, 0);
    same_numbers(c->b_bias, 64, 3, 0);
    choir_adapter_data_free(d);
    refuses("llama", BOTTLENECK("\"non_linearity\": \"relu\""), &image, CHOIR_E_INVALID,
            "has shape [6, 160], the base wants [6, 64]");
    refuses("llama", BOTTLENECK("\"use_parallel_adapter\": true, \"non_linearity\": \"mish\""),
            &image, CHOIR_E_UNIMPLEMENTED, "\"mish\"");
    refuses("llama", BOTTLENECK("\"use_parallel_adapter\": true, \"scaling\": \"much\""), &image,
            CHOIR_E_FORMAT, "scaling");
    refuses("llama", BOTTLENECK("\"use_parallel_adapter\": true, \"scaling\": \"learned\""), &image,
            CHOIR_E_INVALID, "no adapter_scaling beside it");
    image_free(&image);

    add_bottleneck(&image, LAYERS "1.mlp.down_proj", "adapter_down", 6, 64, 64);
    image_add(&image, LAYERS "1.mlp.down_proj.adapter_scaling", 1, 0, 0);
    d = reads("llama", BOTTLENECK("\"scaling\": \"learned\", \"non_linearity\": \"gelu_new\""),
              &image);
    c = find_change(d, CHOIR_ROLE_FFN_DOWN, 1, 0);
    assert_true(c->series && !c->residual && c->act == CHOIR_ADAPTER_GELU_TANH);
    assert_true(c->scale == image_value(4, 0));
    choir_adapter_data_free(d);
    refuses("llama", BOTTLENECK("\"scaling\": 1"), &image, CHOIR_E_INVALID, "adapter_scaling");
    image_free(&image);
    /* Before its matrix: what gate_proj is given would change. */
    add_bottleneck(&image, LAYERS "1.mlp.gate_proj", "adapter_down", 6, 64, 64);
    refuses("llama", BOTTLENECK("\"scaling\": 1"), &image, CHOIR_E_UNIMPLEMENTED,
            "use_parallel_adapter");
    image_free(&image);
}

#define HUB(settings)                                                                              \
    "{\"config\": {\"mh_adapter\": true, \"output_adapter\": true, \"reduction_factor\": 16, "     \
    "\"architecture\": null, " settings "}, \"name\": \"x\", \"version\": \"adapters.1.2.0\"}"
#define HOULSBY                                                                                    \
    "\"non_linearity\": \"Swish\", \"original_ln_before\": false, \"original_ln_after\": true, "   \
    "\"residual_before_ln\": true"

static void adapterhub_lies_behind_blocks(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_bottleneck(&image, "model.layers.1.attention_adapters.adapters.x", "adapter_down.0", 4, 64,
                   64);
    add_bottleneck(&image, "layers.2.output_adapters.adapters.x", "adapter_down.0", 4, 64, 64);
    static const struct {
        const char *config;
        bool series, residual;
    } kinds[] = {
        {HUB(HOULSBY), true, false},
        {HUB("\"non_linearity\": \"relu\", \"original_ln_before\": true"), true, true},
        {HUB("\"non_linearity\": \"relu\", \"is_parallel\": true"), false, true},
        {HUB("\"non_linearity\": \"relu\", \"original_ln_before\": true, "
             "\"original_ln_after\": false, \"residual_before_ln\": false"),
         true, true},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        choir_adapter_data *d = reads("llama", kinds[i].config, &image);
        assert_int_equal(d->n_changes, 2);
        const choir_adapter_change *o = find_change(d, CHOIR_ROLE_ATTN_OUT, 1, 0);
        assert_true(o->series == kinds[i].series && o->residual == kinds[i].residual);
        assert_int_equal(o->act, i == 0 ? CHOIR_ADAPTER_SILU : CHOIR_ADAPTER_RELU);
        assert_true(o->scale == 1 && o->rank == 4);
        same_numbers(o->b_bias, 64, 3, 0);
        same_numbers(find_change(d, CHOIR_ROLE_FFN_DOWN, 2, 0)->a, 4 * 64, 4, 0);
        choir_adapter_data_free(d);
    }
    image_free(&image);
    add_bottleneck(&image, "model.layers.1.output_adapters.adapters.x", "adapter_down.0", 4, 64,
                   64);
    image_add(&image, "model.layers.1.output_adapters.adapters.x.scaling", 64, 0, 0);
    choir_adapter_data *d = reads("llama", HUB(HOULSBY ", \"scaling\": \"channel\""), &image);
    const choir_adapter_change *c = &d->changes[0];
    for (size_t i = 0; i < 64; i++) {
        assert_true(c->b_bias[i] == image_value(3, i) * image_value(4, i));
        for (size_t k = 0; k < 4; k++)
            assert_true(c->b[4 * i + k] == image_value(2, 4 * i + k) * image_value(4, i));
    }
    choir_adapter_data_free(d);
    refuses("llama", HUB(HOULSBY ", \"scaling\": 1.0"), &image, CHOIR_E_INVALID,
            "adapters.x.scaling");
    refuses("llama", HUB(HOULSBY ", \"scaling\": \"learned\""), &image, CHOIR_E_INVALID,
            "has shape [64], the base wants [1]");
    image_free(&image);
}

static void adapterhubs_options_are_refused_by_name(void **state)
{
    (void)state;
    static const struct {
        const char *config, *word;
    } bad[] = {
        {HUB("\"non_linearity\": \"relu\", \"ln_before\": true"), "ln_before"},
        {HUB("\"non_linearity\": \"relu\", \"ln_after\": true"), "ln_after"},
        {HUB("\"non_linearity\": \"relu\", \"use_gating\": true"), "use_gating"},
        {HUB("\"non_linearity\": \"relu\", \"phm_layer\": true"), "phm_layer"},
        {HUB("\"non_linearity\": \"relu\", \"inv_adapter\": \"nice\""), "inv_adapter"},
        {HUB("\"non_linearity\": \"leakyrelu\""), "leakyrelu"},
        {HUB("\"non_linearity\": \"relu\", \"residual_before_ln\": \"post_add\""), "post_add"},
        {HUB("\"non_linearity\": \"relu\", \"original_ln_after\": false"), "left out"},
        {HUB("\"non_linearity\": \"relu\", \"original_ln_before\": true, "
             "\"residual_before_ln\": false"),
         "added twice"},
        {"{\"config\": {\"architecture\": \"lora\", \"r\": 8}}", "\"lora\""},
    };
    adapter_image image = {0};
    add_bottleneck(&image, "model.layers.1.output_adapters.adapters.x", "adapter_down.0", 4, 64,
                   64);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refuses("llama", bad[i].config, &image, CHOIR_E_UNIMPLEMENTED, bad[i].word);
    /* Models of experts have no matrix at the end of the block. */
    refuses("mixtral", HUB(HOULSBY), &image, CHOIR_E_INVALID, "which the base (mixtral) lacks");
    image_add(&image, "model.layers.1.output_adapters.adapters.x.gate.weight", 1, 64, 0);
    refuses("llama", HUB(HOULSBY), &image, CHOIR_E_INVALID, "adapters.x.gate.weight");
    image_free(&image);
    /* What names no version calls by "gelu" what is gelu_new since. */
    add_bottleneck(&image, "model.layers.1.output_adapters.adapters.x", "adapter_down.0", 4, 64,
                   64);
    choir_adapter_data *d = reads("llama", "{\"config\": {\"non_linearity\": \"gelu\"}}", &image);
    assert_int_equal(d->changes[0].act, CHOIR_ADAPTER_GELU_TANH);
    choir_adapter_data_free(d);
    image_free(&image);
}

/* -- GGUF -- */

static void gguf_loras_follow_the_base(void **state)
{
    (void)state;
    adapter_image image = {0};
    image_add(&image, "blk.1.attn_q.weight.lora_a", 2, 64, 0);
    image_add(&image, "blk.1.attn_q.weight.lora_b", 64, 2, 0);
    image_add(&image, "token_embd.weight.lora_a", 512, 2, 0);
    image_add(&image, "token_embd.weight.lora_b", 64, 2, 0);
    image_add(&image, "blk.1.ffn_norm.weight", 64, 0, 0);
    static const char *const models[] = {"llama.gguf", "llama"};
    for (size_t m = 0; m < 2; m++) {
        image_gguf(&image, "llama", 6);
        choir_adapter_data *d = reads(models[m], NULL, &image);
        assert_string_equal(d->kind, "LoRA");
        assert_true(d->n_changes == 3 && d->digest != 0);
        const choir_adapter_change *q = find_change(d, CHOIR_ROLE_ATTN_Q, 1, 0);
        assert_true(q->rank == 2 && q->scale == 3);
        same_numbers(q->a, 2 * 64, 0, 0);
        for (uint32_t r = 0; r < 64; r++) /* the base's rows in halves, the file's in pairs */
            same_numbers(q->b + 2 * (size_t)(m == 0 ? r : half_of(r, 16)), 2, 1, 2 * (size_t)r);
        const choir_adapter_change *e = find_change(d, CHOIR_ROLE_EMBEDDING, 0, 0);
        for (uint32_t k = 0; k < 2; k++)
            for (uint32_t t = 0; t < 512; t++)
                same_numbers(e->a + 512 * (size_t)k + t, 1, 2, 2 * (size_t)t + k);
        same_numbers(e->b, 64 * 2, 3, 0);
        same_numbers(find_change(d, CHOIR_ROLE_FFN_NORM, 1, 0)->weight, 64, 4, 0);
        choir_adapter_data_free(d);
    }
    image_gguf(&image, "llama", 0);
    choir_adapter_data *d = reads("llama.gguf", NULL, &image);
    assert_true(find_change(d, CHOIR_ROLE_ATTN_Q, 1, 0)->scale == 1);
    choir_adapter_data_free(d);
    image_gguf(&image, "qwen2", 6);
    refuses("llama.gguf", NULL, &image, CHOIR_E_INVALID, "\"qwen2\", which is not the base's");
    image_free(&image);
}

static void gguf_loras_of_experts_are_stacked(void **state)
{
    (void)state;
    adapter_image image = {0};
    image_add(&image, "blk.0.ffn_up_exps.weight.lora_a", 5, 2, 60);
    image_add(&image, "blk.0.ffn_up_exps.weight.lora_b", 5, 40, 2);
    image_add(&image, "blk.0.ffn_gate_inp.weight.lora_a", 2, 60, 0);
    image_add(&image, "blk.0.ffn_gate_inp.weight.lora_b", 5, 2, 0);
    image_gguf(&image, "llama", 6);
    static const char *const models[] = {"mixtral_odd.gguf", "mixtral_odd"};
    for (size_t m = 0; m < 2; m++) {
        choir_adapter_data *d = reads(models[m], NULL, &image);
        assert_int_equal(d->n_changes, 6);
        for (uint32_t e = 0; e < 5; e++) {
            const choir_adapter_change *up = find_change(d, CHOIR_ROLE_EXPERT_UP, 0, e);
            same_numbers(up->a, 2 * 60, 0, 120 * (size_t)e);
            same_numbers(up->b, 40 * 2, 1, 80 * (size_t)e);
        }
        choir_adapter_data_free(d);
    }
    image.tensors[1].dims[0] = 4;
    image_gguf(&image, "llama", 6);
    refuses("mixtral_odd", NULL, &image, CHOIR_E_INVALID,
            "has shape [4, 40, 2], the base wants [5, 40, 2]");
    image_free(&image);
}

static void bad_gguf_loras_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *name, *word;
    } bad[] = {
        {"blk.0.attn_q.weight.lora_a", "no lora_b beside it"},
        {"blk.0.attn_q.weight.lora_b", "blk.0.attn_q.weight.lora_b' has no place"},
        {"blk.0.attn_x.weight.lora_a", "blk.0.attn_x.weight.lora_a' has no place"},
        {"blk.9.attn_q.weight.lora_a", "layer 9, the base has 3"},
        {"blk.0.attn_norm.weight.lora_a", "attn_norm.weight.lora_a' has no place"},
        {"blk.0.attn_q.weight", "blk.0.attn_q.weight' has no place"},
        {"blk.0.ffn_gate_exps.weight.lora_a", "ffn_gate_exps.weight.lora_a"},
        {"blk.0.x_norm.weight", "x_norm.weight' has no place"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        adapter_image image = {0};
        image_add(&image, bad[i].name, 2, 64, 0);
        image_gguf(&image, "llama", 6);
        refuses("llama", NULL, &image, CHOIR_E_INVALID, bad[i].word);
        image_free(&image);
    }
    adapter_image image = {0};
    choir_adapter_data *d;
    image_add(&image, "blk.0.attn_q.weight.lora_a", 2, 64, 0);
    image_add(&image, "blk.0.attn_q.weight.lora_b", 64, 2, 0);
    image.tensors[1].values[5] = NAN;
    image_gguf(&image, "llama", 6);
    choir_adapter_source s = source_of(NULL, &image);
    says(choir_adapter_data_parse(base_of("llama"), &s, &d), CHOIR_E_DATA_LOSS,
         "lora_b' holds NaN");
    for (size_t n = 0; n < image.n_bytes - 64; n += 13) { /* 64: padding */
        s.tensor_bytes = n;
        says(choir_adapter_data_parse(base_of("llama"), &s, &d), CHOIR_E_FORMAT, "here");
    }
    char *type = memmem(image.bytes, image.n_bytes, "adapter.type", 12);
    memcpy(type, "adapter.typo", 12);
    s.tensor_bytes = image.n_bytes;
    says(choir_adapter_data_parse(base_of("llama"), &s, &d), CHOIR_E_UNIMPLEMENTED, "adapter.type");
    image_free(&image);
}

/* Every allocation fails once, of each kind. */
static void lacks_memory(const char *base, const char *config, adapter_image *image)
{
    if (config != NULL) image_safetensors(image);
    const choir_adapter_source s = source_of(config, image);
    const choir_model_config *c = base_of(base);
    size_t before = choir_memory_bytes(CHOIR_MEM_OTHER);
    choir_adapter_data *d = NULL;
    for (uint64_t at = 1;; at++) {
        choir_memory_fail_at(at);
        choir_status status = choir_adapter_data_parse(c, &s, &d);
        choir_memory_fail_at(0);
        if (status == CHOIR_OK) break;
        assert_int_equal(status, CHOIR_E_NO_MEMORY);
        assert_int_equal(choir_memory_bytes(CHOIR_MEM_OTHER), before);
    }
    choir_adapter_data_free(d);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_OTHER), before);
    image_free(image);
}

static void lack_of_memory_is_told(void **state)
{
    (void)state;
    adapter_image image = {0};
    image_add(&image, LAYERS "0.self_attn.k_proj.ia3_l", 32, 1, 0);
    lacks_memory("llama", IA3("\".*x\""), &image);
    image_add(&image, "base_model.vera_A", 3, 160, 0);
    image_add(&image, "base_model.vera_B", 64, 3, 0);
    image_add(&image, LAYERS "0.self_attn.k_proj.vera_lambda_d", 3, 0, 0);
    image_add(&image, LAYERS "0.self_attn.k_proj.vera_lambda_b", 32, 0, 0);
    lacks_memory("llama", "{\"peft_type\": \"VERA\", \"r\": 3}", &image);
    image_add(&image, "prompt_embeddings", 5, 3 * 2 * 32, 0);
    lacks_memory("llama", "{\"peft_type\": \"PREFIX_TUNING\", \"num_virtual_tokens\": 5}", &image);
    image_add(&image, "model.layers.1.output_adapters.adapters.x.adapter_down.0.weight", 4, 64, 0);
    image_add(&image, "model.layers.1.output_adapters.adapters.x.adapter_up.weight", 64, 4, 0);
    lacks_memory("llama", HUB(HOULSBY), &image);
    image_add(&image, LAYERS "0.mlp.experts.down_proj", 8, 64, 96);
    image_add(&image, LAYERS "0.mlp.gate.weight", 8, 64, 0);
    lacks_memory("mixtral", SAVED("\"mlp\""), &image);
    image_add(&image, "token_embd.weight.lora_a", 512, 2, 0);
    image_add(&image, "token_embd.weight.lora_b", 64, 2, 0);
    image_gguf(&image, "llama", 6);
    lacks_memory("llama", NULL, &image);
}

static int tear_down(void **state)
{
    (void)state;
    close_bases();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(saved_modules_take_the_bases_place),
        cmocka_unit_test(norms_less_one_are_made_whole),
        cmocka_unit_test(saved_experts_are_taken_apart),
        cmocka_unit_test(biases_of_the_base_are_replaced),
        cmocka_unit_test(ia3_scales_outputs_and_inputs),
        cmocka_unit_test(vera_is_folded),
        cmocka_unit_test(prompts_are_rows_of_the_table),
        cmocka_unit_test(prefixes_are_keys_and_values_of_every_layer),
        cmocka_unit_test(bottlenecks_lie_beside_or_behind),
        cmocka_unit_test(adapterhub_lies_behind_blocks),
        cmocka_unit_test(adapterhubs_options_are_refused_by_name),
        cmocka_unit_test(gguf_loras_follow_the_base),
        cmocka_unit_test(gguf_loras_of_experts_are_stacked),
        cmocka_unit_test(bad_gguf_loras_are_refused),
        cmocka_unit_test(lack_of_memory_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, tear_down);
}
