/* LoRA as PEFT saves it, read in the base's terms: names, scales, the order of rows, fused
 * matrices, experts in both layouts; and files that are refused. FAULTS 18, 29. */
#include "tests/engine/adapter_case.h"

#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

static void lora_is_found_by_name_and_scaled(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "2.self_attn.o_proj", 2, 64, 64);
    add_lora(&image, LAYERS "0.mlp.down_proj", 2, 160, 64);
    add_lora(&image, LAYERS "0.mlp.gate_proj", 2, 64, 160);
    add_lora(&image, "base_model.model.lm_head", 2, 64, 512);
    choir_adapter_data *d = reads("llama", LORA, &image);
    assert_string_equal(d->kind, "LoRA");
    assert_int_equal(d->n_changes, 4);
    assert_int_equal(d->max_rank, 2);
    assert_int_equal(d->n_parameters, 2 * (64 + 64 + 160 + 64 + 64 + 160 + 64 + 512));
    static const choir_role order[] = {CHOIR_ROLE_HEAD, CHOIR_ROLE_FFN_GATE, CHOIR_ROLE_FFN_DOWN,
                                       CHOIR_ROLE_ATTN_OUT};
    for (size_t i = 0; i < 4; i++) assert_int_equal(d->changes[i].role, order[i]);
    const choir_adapter_change *c = find_change(d, CHOIR_ROLE_FFN_DOWN, 0, 0);
    assert_true(c->rows == 64 && c->cols == 160 && c->rank == 2 && c->scale == 3);
    assert_true(c->act == CHOIR_ADAPTER_LINEAR && !c->series);
    assert_int_equal(c->has, CHOIR_ADAPTER_HAS_LOW_RANK);
    same_numbers(c->a, 2 * 160, 2, 0);
    same_numbers(c->b, 64 * 2, 3, 0);
    choir_adapter_data_free(d);
    image_free(&image);
}

/* llama.cpp's converter gives q's and k's rows the order of pairs; what an adapter says of rows
 * follows. */
static void rows_of_q_and_k_lie_as_the_base_has_them(void **state)
{
    (void)state;
    static const char *const config =
        "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, \"use_dora\": true}";
    static const char *const modules[] = {"q_proj", "k_proj", "v_proj"};
    static const choir_role roles[] = {CHOIR_ROLE_ATTN_Q, CHOIR_ROLE_ATTN_K, CHOIR_ROLE_ATTN_V};
    static const uint64_t rows[] = {64, 32, 32};
    adapter_image image = {0};
    for (size_t i = 0; i < 3; i++) {
        char name[160];
        snprintf(name, sizeof name, LAYERS "1.self_attn.%s", modules[i]);
        add_lora(&image, name, 2, 64, rows[i]);
        snprintf(name, sizeof name, LAYERS "1.self_attn.%s.lora_magnitude_vector%s", modules[i],
                 i == 0 ? ".weight" : "");
        image_add(&image, name, rows[i], 0, 0);
    }
    static const struct {
        const char *name;
        bool pairs;
    } models[] = {{"llama", false}, {"llama.gguf", true}, {"qwen2", false}, {"qwen2.gguf", false}};
    for (size_t m = 0; m < 4; m++) {
        choir_adapter_data *d = reads(models[m].name, config, &image);
        assert_string_equal(d->kind, "DoRA");
        for (size_t i = 0; i < 3; i++) {
            const choir_adapter_change *c = find_change(d, roles[i], 1, 0);
            same_numbers(c->a, 2 * 64, 3 * i, 0);
            for (uint32_t r = 0; r < c->rows; r++) {
                uint32_t from = models[m].pairs && i < 2 ? half_of(r, 16) : r;
                same_numbers(c->b + 2 * (size_t)r, 2, 3 * i + 1, 2 * (size_t)from);
                same_numbers(c->magnitude + r, 1, 3 * i + 2, from);
            }
        }
        choir_adapter_data_free(d);
    }
    image_free(&image);
}

static void dora_needs_its_magnitudes(void **state)
{
    (void)state;
    const char *dora = "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, \"use_dora\": true}";
    const char *both = "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, \"use_dora\": true, "
                       "\"lora_bias\": true}";
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.o_proj", 2, 64, 64);
    refuses("llama", dora, &image, CHOIR_E_INVALID, "no lora_magnitude_vector");
    refuses("llama", both, &image, CHOIR_E_UNIMPLEMENTED, "lora_bias");
    image_add(&image, LAYERS "0.self_attn.o_proj.lora_magnitude_vector", 64, 0, 0);
    refuses("llama", LORA, &image, CHOIR_E_INVALID, "o_proj.lora_magnitude_vector");
    image.tensors[2].dims[0] = 63;
    image.tensors[2].n = 63;
    refuses("llama", dora, &image, CHOIR_E_INVALID, "has shape [63], the base wants [64]");
    image_free(&image);
}

static void biases_of_b_are_read(void **state)
{
    (void)state;
    const char *config =
        "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, \"lora_bias\": true}";
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.k_proj", 2, 64, 32);
    image_add(&image, LAYERS "0.self_attn.k_proj.lora_B.bias", 32, 0, 0);
    choir_adapter_data *d = reads("llama.gguf", config, &image);
    const choir_adapter_change *c = find_change(d, CHOIR_ROLE_ATTN_K, 0, 0);
    for (uint32_t r = 0; r < 32; r++) same_numbers(c->b_bias + r, 1, 2, half_of(r, 16));
    choir_adapter_data_free(d);
    refuses("llama", LORA, &image, CHOIR_E_INVALID, "k_proj.lora_B.bias");
    image_free(&image);
}

static void fused_modules_share_a_and_cut_b(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.qkv_proj", 2, 48, 80);
    add_lora(&image, LAYERS "0.mlp.gate_up_proj", 2, 48, 144);
    static const char *const models[] = {"phi3", "phi3.gguf"};
    static const struct {
        choir_role role;
        size_t b, first;
        uint32_t rows;
    } parts[] = {{CHOIR_ROLE_ATTN_Q, 1, 0, 48},
                 {CHOIR_ROLE_ATTN_K, 1, 48, 16},
                 {CHOIR_ROLE_ATTN_V, 1, 64, 16},
                 {CHOIR_ROLE_FFN_GATE, 3, 0, 72},
                 {CHOIR_ROLE_FFN_UP, 3, 72, 72}};
    for (size_t m = 0; m < 2; m++) {
        choir_adapter_data *d = reads(models[m], LORA, &image);
        assert_int_equal(d->n_changes, 5);
        for (size_t i = 0; i < 5; i++) {
            const choir_adapter_change *c = find_change(d, parts[i].role, 0, 0);
            assert_int_equal(c->rows, parts[i].rows);
            same_numbers(c->a, 2 * 48, parts[i].b - 1, 0);
            same_numbers(c->b, 2 * (size_t)c->rows, parts[i].b, 2 * parts[i].first);
        }
        assert_ptr_equal(find_change(d, CHOIR_ROLE_ATTN_Q, 0, 0)->a,
                         find_change(d, CHOIR_ROLE_ATTN_V, 0, 0)->a);
        choir_adapter_data_free(d);
    }
    image_free(&image);
}

static void experts_are_found_one_by_one(void **state)
{
    (void)state;
    static const char *const names[] = {"block_sparse_moe.experts.7.w1",
                                        "block_sparse_moe.experts.0.w2",
                                        "block_sparse_moe.experts.3.w3"};
    adapter_image image = {0};
    char name[160];
    for (size_t i = 0; i < 3; i++) {
        snprintf(name, sizeof name, LAYERS "2.%s", names[i]);
        add_lora(&image, name, 2, i == 1 ? 96 : 64, i == 1 ? 64 : 96);
    }
    choir_adapter_data *d = reads("mixtral", LORA, &image);
    assert_int_equal(d->n_changes, 3);
    same_numbers(find_change(d, CHOIR_ROLE_EXPERT_GATE, 2, 7)->b, 2 * 96, 1, 0);
    same_numbers(find_change(d, CHOIR_ROLE_EXPERT_DOWN, 2, 0)->b, 2 * 64, 3, 0);
    same_numbers(find_change(d, CHOIR_ROLE_EXPERT_UP, 2, 3)->a, 2 * 64, 4, 0);
    choir_adapter_data_free(d);
    image_free(&image);
}

/* The names of a family's files, and those that transformers 5 gives the same modules. */
static void routers_have_the_names_of_both_transformers(void **state)
{
    (void)state;
    static const struct {
        const char *base, *name;
        uint64_t hidden, experts;
    } routers[] = {{"mixtral", "block_sparse_moe.gate", 64, 8},
                   {"mixtral", "mlp.gate", 64, 8},
                   {"granitemoe", "block_sparse_moe.router", 60, 6},
                   {"granitemoe", "block_sparse_moe.router.layer", 60, 6},
                   {"gpt_oss_mxfp4", "mlp.router", 64, 5},
                   {"qwen2_moe", "mlp.gate", 60, 5}};
    for (size_t i = 0; i < sizeof routers / sizeof *routers; i++) {
        adapter_image image = {0};
        char name[160];
        snprintf(name, sizeof name, LAYERS "0.%s", routers[i].name);
        add_lora(&image, name, 2, routers[i].hidden, routers[i].experts);
        choir_adapter_data *d = reads(routers[i].base, LORA, &image);
        assert_int_equal(find_change(d, CHOIR_ROLE_ROUTER, 0, 0)->rows, routers[i].experts);
        choir_adapter_data_free(d);
        image_free(&image);
    }
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.mlp.gate", 2, 64, 8);
    refuses("llama", LORA, &image, CHOIR_E_INVALID, "which the base (llama) lacks");
    image_free(&image);
}

/* Element k, i of A and i, k of B of an expert, as PEFT lays out all experts' pairs: A's rows one
 * expert after the other, B's columns one expert beside the other. */
static void same_expert(const choir_adapter_change *c, size_t a, size_t b, uint32_t n_experts,
                        uint32_t first_row, uint32_t step)
{
    uint32_t r = c->rank, e = c->index;
    same_numbers(c->a, (size_t)r * c->cols, a, (size_t)e * r * c->cols);
    for (uint32_t i = 0; i < c->rows; i++)
        for (uint32_t k = 0; k < r; k++) {
            size_t row = first_row + (size_t)step * i;
            same_numbers(c->b + (size_t)i * r + k, 1, b, row * r * n_experts + k * n_experts + e);
        }
}

#define TARGETS "\"target_parameters\": [\"mlp.experts.down_proj\", \"mlp.experts.gate_up_proj\"]"
#define STACKED                                                                                    \
    "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, \"peft_version\": \"0.21.2\", "

/* The outer wrapper is of the module's last parameter, the inner one of its first. */
static void stacked_experts_are_taken_apart(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "1.mlp.experts.base_layer", 2 * 8, 64, 192);
    add_lora(&image, LAYERS "1.mlp.experts", 2 * 8, 96, 64);
    choir_adapter_data *d = reads("mixtral", STACKED TARGETS "}", &image);
    assert_int_equal(d->n_changes, 24);
    for (uint32_t e = 0; e < 8; e++) {
        const choir_adapter_change *gate = find_change(d, CHOIR_ROLE_EXPERT_GATE, 1, e);
        assert_true(gate->rank == 2 && gate->scale == 3 && gate->rows == 96 && gate->cols == 64);
        same_expert(gate, 0, 1, 8, 0, 1);
        same_expert(find_change(d, CHOIR_ROLE_EXPERT_UP, 1, e), 0, 1, 8, 96, 1);
        same_expert(find_change(d, CHOIR_ROLE_EXPERT_DOWN, 1, e), 2, 3, 8, 0, 1);
    }
    choir_adapter_data_free(d);
    image_free(&image);
}

static void interleaved_experts_are_taken_apart(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "1.mlp.experts.base_layer", 2 * 5, 64, 64);
    add_lora(&image, LAYERS "1.mlp.experts", 2 * 5, 32, 64);
    choir_adapter_data *d = reads("gpt_oss_mxfp4", STACKED TARGETS "}", &image);
    for (uint32_t e = 0; e < 5; e++) {
        same_expert(find_change(d, CHOIR_ROLE_EXPERT_GATE, 1, e), 0, 1, 5, 0, 2);
        same_expert(find_change(d, CHOIR_ROLE_EXPERT_UP, 1, e), 0, 1, 5, 1, 2);
        same_expert(find_change(d, CHOIR_ROLE_EXPERT_DOWN, 1, e), 2, 3, 5, 0, 1);
    }
    choir_adapter_data_free(d);
    image_free(&image);
}

/* llama4's experts lie transposed and do not say so: PEFT puts the outputs beside A. */
static void experts_that_peft_turned_are_turned_back(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "1.feed_forward.experts.base_layer", 2 * 5, 80, 60);
    add_lora(&image, LAYERS "1.feed_forward.experts", 2 * 5, 60, 40);
    const char *config = STACKED "\"target_parameters\": [\"gate_up_proj\", \"down_proj\"]}";
    choir_adapter_data *d = reads("llama4_standard", config, &image);
    for (uint32_t e = 0; e < 5; e++) {
        const choir_adapter_change *up = find_change(d, CHOIR_ROLE_EXPERT_UP, 1, e);
        assert_true(up->rows == 40 && up->cols == 60);
        for (uint32_t k = 0; k < 2; k++) {
            for (uint32_t i = 0; i < 40; i++)
                same_numbers(up->b + 2 * (size_t)i + k, 1, 0, (2 * (size_t)e + k) * 80 + 40 + i);
            for (uint32_t i = 0; i < 60; i++)
                same_numbers(up->a + 60 * (size_t)k + i, 1, 1, 10 * (size_t)i + 5 * k + e);
        }
        const choir_adapter_change *down = find_change(d, CHOIR_ROLE_EXPERT_DOWN, 1, e);
        for (uint32_t k = 0; k < 2; k++)
            same_numbers(down->a + 40 * (size_t)k, 1, 3, 5 * (size_t)k + e);
    }
    choir_adapter_data_free(d);
    image_free(&image);
}

/* Where a matrix is square, the version of PEFT says which side the inputs are on. */
static void square_experts_follow_the_version(void **state)
{
    (void)state;
    static const struct {
        const char *version;
        bool swapped;
    } versions[] = {{"\"peft_version\": \"0.21.2\", ", false},
                    {"\"peft_version\": \"0.19.1\", ", false},
                    {"\"peft_version\": \"0.19.0\", ", true},
                    {"\"peft_version\": \"0.18.0\", ", true},
                    {"", true}};
    choir_model_config base = *base_of("mixtral");
    base.expert_hidden = base.hidden;
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.mlp.experts", 2 * 8, 64, 64);
    image_safetensors(&image);
    for (size_t i = 0; i < sizeof versions / sizeof *versions; i++) {
        char config[256];
        snprintf(config, sizeof config,
                 "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, %s"
                 "\"target_parameters\": [\"experts.down_proj\"]}",
                 versions[i].version);
        choir_adapter_data *d;
        const choir_adapter_source s = source_of(config, &image);
        if (choir_adapter_data_parse(&base, &s, &d) != CHOIR_OK)
            fail_msg("%s", choir_error_message());
        const choir_adapter_change *c = find_change(d, CHOIR_ROLE_EXPERT_DOWN, 0, 3);
        if (!versions[i].swapped) same_expert(c, 0, 1, 8, 0, 1);
        for (uint32_t k = 0; versions[i].swapped && k < 64; k++) {
            same_numbers(c->a + k, 1, 1, 16 * (size_t)k + 3);     /* rank 0 of expert 3, column k */
            same_numbers(c->b + 2 * k, 1, 0, 6 * (size_t)64 + k); /* row k, rank 0 */
        }
        choir_adapter_data_free(d);
    }
    image_free(&image);
}

static void stacked_experts_need_their_targets(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "1.mlp.experts", 2 * 8, 96, 64);
    refuses("mixtral", LORA, &image, CHOIR_E_INVALID, "target_parameters");
    choir_adapter_data *d =
        reads("mixtral", STACKED "\"target_parameters\": [\"experts.down_proj\"]}", &image);
    assert_int_equal(d->n_changes, 8);
    choir_adapter_data_free(d);
    refuses("mixtral", STACKED "\"target_parameters\": [\"experts.gate_up_proj\"]}", &image,
            CHOIR_E_INVALID, "[16, 64]");
    refuses("mixtral", STACKED "\"target_parameters\": [\"experts.gate_up_proj_bias\"]}", &image,
            CHOIR_E_UNIMPLEMENTED, "gate_up_proj_bias");
    refuses("llama", STACKED TARGETS "}", &image, CHOIR_E_INVALID, "1.mlp.experts.lora_A");
    add_lora(&image, LAYERS "1.mlp.experts.base_layer.base_layer", 2 * 8, 96, 64);
    refuses("mixtral", STACKED TARGETS "}", &image, CHOIR_E_INVALID, "parameter 3");
    image_free(&image);
}

static void tables_are_adapted_by_rows(void **state)
{
    (void)state;
    adapter_image image = {0};
    image_add(&image, "base_model.model.model.embed_tokens.lora_embedding_A", 2, 512, 0);
    image_add(&image, "base_model.model.model.embed_tokens.lora_embedding_B", 64, 2, 0);
    choir_adapter_data *d = reads("llama", LORA, &image);
    const choir_adapter_change *c = find_change(d, CHOIR_ROLE_EMBEDDING, 0, 0);
    assert_true(c->rows == 512 && c->cols == 64);
    same_numbers(c->a, 2 * 512, 0, 0);
    same_numbers(c->b, 64 * 2, 1, 0);
    choir_adapter_data_free(d);
    /* PEFT saves the whole table beside it. */
    image_add(&image, "base_model.model.model.embed_tokens.base_layer.weight", 512, 64, 0);
    d = reads("llama", LORA, &image);
    assert_int_equal(d->n_changes, 1);
    assert_int_equal(d->changes[0].has, CHOIR_ADAPTER_HAS_LOW_RANK | CHOIR_ADAPTER_HAS_WEIGHT |
                                            CHOIR_ADAPTER_HAS_COPY);
    same_numbers(d->changes[0].weight, 512 * 64, 2, 0);
    choir_adapter_data_free(d);
    image_free(&image);
    add_lora(&image, "base_model.model.model.embed_tokens", 2, 64, 512);
    refuses("llama", LORA, &image, CHOIR_E_INVALID, "embed_tokens.lora_A");
    image_free(&image);
    /* A head that is the base's table can be adapted alone. */
    add_lora(&image, "base_model.model.lm_head", 2, 60, 288);
    d = reads("gemma2", LORA, &image);
    assert_int_equal(d->changes[0].role, CHOIR_ROLE_HEAD);
    choir_adapter_data_free(d);
    image_free(&image);
}

static void latent_attention_is_adapted_head_by_head(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.q_a_proj", 2, 60, 30);
    add_lora(&image, LAYERS "0.self_attn.q_b_proj", 2, 30, 72);
    add_lora(&image, LAYERS "0.self_attn.kv_a_proj_with_mqa", 2, 60, 38);
    add_lora(&image, LAYERS "0.self_attn.kv_b_proj", 2, 30, 96);
    choir_adapter_data *d = reads("deepseek_v3", LORA, &image);
    same_numbers(find_change(d, CHOIR_ROLE_ATTN_Q_B, 0, 0)->b, 72 * 2, 3, 0);
    for (uint32_t head = 0; head < 3; head++) { /* 16 rows of keys, 16 of values */
        const choir_adapter_change *k = find_change(d, CHOIR_ROLE_ATTN_K_B, 0, head);
        const choir_adapter_change *v = find_change(d, CHOIR_ROLE_ATTN_V_B, 0, head);
        assert_true(k->rows == 30 && k->cols == 16 && v->rows == 16 && v->cols == 30);
        same_numbers(v->a, 2 * 30, 6, 0);
        same_numbers(v->b, 16 * 2, 7, 2 * (32 * (size_t)head + 16));
        for (uint32_t n = 0; n < 16; n++)
            same_numbers(k->a + 16 + n, 1, 7, 2 * (32 * (size_t)head + n) + 1);
        for (uint32_t n = 0; n < 30; n++) same_numbers(k->b + 2 * n + 1, 1, 6, 30 + n);
    }
    choir_adapter_data_free(d);
    image_free(&image);
    image_add(&image, LAYERS "0.self_attn.kv_b_proj.weight", 96, 30, 0);
    refuses("deepseek_v3",
            "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, \"modules_to_save\": "
            "[\"kv_b_proj\"]}",
            &image, CHOIR_E_INVALID, "kv_b_proj.weight");
    image_free(&image);
}

static void models_that_see_have_their_text_below_another_name(void **state)
{
    (void)state;
    static const char *const names[] = {
        "base_model.model.model.language_model.layers.0.self_attn.o_proj",
        "base_model.model.language_model.model.layers.0.self_attn.o_proj"};
    for (size_t i = 0; i < 2; i++) {
        adapter_image image = {0};
        add_lora(&image, names[i], 2, 64, 64);
        choir_adapter_data *d = reads("llama", LORA, &image);
        assert_int_equal(d->changes[0].role, CHOIR_ROLE_ATTN_OUT);
        choir_adapter_data_free(d);
        image_free(&image);
    }
}

static void invocations_are_read(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.o_proj", 2, 64, 64);
#define INVOKED(tokens)                                                                            \
    "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 6, \"alora_invocation_tokens\": " tokens  \
    "}"
    choir_adapter_data *d = reads("llama", INVOKED("[5, 511, 0]"), &image);
    assert_string_equal(d->kind, "aLoRA");
    assert_int_equal(d->n_invocation, 3);
    assert_true(d->invocation[0] == 5 && d->invocation[1] == 511 && d->invocation[2] == 0);
    choir_adapter_data_free(d);
    refuses("llama", INVOKED("[5, 512]"), &image, CHOIR_E_INVALID, "token 1");
    refuses("llama", INVOKED("[-1]"), &image, CHOIR_E_INVALID, "token 0");
    refuses("llama", INVOKED("\"go\""), &image, CHOIR_E_INVALID, "alora_invocation_tokens");
    image_free(&image);
}

/* What changes an adapter's meaning and is not Choir's is refused by its name. */
static void settings_that_mean_something_else_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *setting;
        choir_status status;
        const char *word;
    } bad[] = {
        {"\"layer_replication\": [[0, 2]]", CHOIR_E_UNIMPLEMENTED, "layer_replication"},
        {"\"use_qalora\": true", CHOIR_E_UNIMPLEMENTED, "use_qalora"},
        {"\"use_bdlora\": {\"nblocks\": 2}", CHOIR_E_UNIMPLEMENTED, "use_bdlora"},
        {"\"arrow_config\": {\"top_k\": 3}", CHOIR_E_UNIMPLEMENTED, "arrow_config"},
        {"\"monteclora_config\": {\"a\": 1}", CHOIR_E_UNIMPLEMENTED, "monteclora_config"},
        {"\"velora_config\": {\"a\": 1}", CHOIR_E_UNIMPLEMENTED, "velora_config"},
        {"\"kasa_config\": {\"a\": 1}", CHOIR_E_UNIMPLEMENTED, "kasa_config"},
        {"\"trainable_token_indices\": [1]", CHOIR_E_UNIMPLEMENTED, "trainable_token_indices"},
        {"\"use_what_is_to_come\": true", CHOIR_E_UNIMPLEMENTED, "use_what_is_to_come"},
        {"\"tomorrow_config\": {\"a\": 1}", CHOIR_E_UNIMPLEMENTED, "tomorrow_config"},
        {"\"init_lora_weights\": \"pissa_niter_4\"", CHOIR_E_UNIMPLEMENTED, "pissa_niter_4"},
        {"\"init_lora_weights\": \"olora\"", CHOIR_E_UNIMPLEMENTED, "olora"},
        {"\"init_lora_weights\": \"loftq\"", CHOIR_E_UNIMPLEMENTED, "loftq"},
        {"\"use_dora\": 1", CHOIR_E_FORMAT, "use_dora"},
        {"\"use_rslora\": \"yes\"", CHOIR_E_FORMAT, "use_rslora"},
    };
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.o_proj", 2, 64, 64);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char config[256];
        snprintf(config, sizeof config,
                 "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 4, %s}", bad[i].setting);
        refuses("llama", config, &image, bad[i].status, bad[i].word);
    }
    choir_adapter_data *d = reads("llama",
                                  "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 4, "
                                  "\"use_qalora\": false, \"arrow_config\": null, "
                                  "\"loftq_config\": {}, \"init_lora_weights\": \"gaussian\", "
                                  "\"layers_to_transform\": [0], \"fan_in_fan_out\": true, "
                                  "\"unsloth_fixed\": true, \"bias\": \"none\"}",
                                  &image);
    assert_int_equal(d->n_changes, 1);
    choir_adapter_data_free(d);
    image_free(&image);
}

static void configurations_that_are_none_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *config;
        choir_status status;
        const char *word;
    } bad[] = {
        {"", CHOIR_E_FORMAT, "adapter_config.json"},
        {"[1]", CHOIR_E_FORMAT, "no JSON object"},
        {"{\"peft_type\": ", CHOIR_E_FORMAT, "line 1"},
        {"{\"r\": 1, \"r\": 2}", CHOIR_E_FORMAT, "uplicate"},
        {"{}", CHOIR_E_UNIMPLEMENTED, "LORA, IA3, VERA"},
        {"{\"peft_type\": \"LOHA\"}", CHOIR_E_UNIMPLEMENTED, "\"LOHA\"; Choir reads LORA"},
        {"{\"peft_type\": 7}", CHOIR_E_UNIMPLEMENTED, "peft_type"},
        {"{\"peft_type\": \"LORA\", \"r\": 4}", CHOIR_E_FORMAT, "lora_alpha"},
        {"{\"peft_type\": \"LORA\", \"lora_alpha\": 8}", CHOIR_E_FORMAT, "no number for r"},
        {"{\"peft_type\": \"LORA\", \"r\": 0, \"lora_alpha\": 8}", CHOIR_E_INVALID, "r is 0"},
        {"{\"peft_type\": \"LORA\", \"r\": 2.5, \"lora_alpha\": 8}", CHOIR_E_INVALID, "r is 2.5"},
        {"{\"peft_type\": \"LORA\", \"r\": -2, \"lora_alpha\": 8}", CHOIR_E_INVALID, "r is -2"},
        {"{\"peft_type\": \"LORA\", \"r\": 4097, \"lora_alpha\": 8}", CHOIR_E_INVALID, "4097"},
        {"{\"peft_type\": \"LORA\", \"r\": 3, \"lora_alpha\": 8}", CHOIR_E_INVALID,
         "has shape [2, 64], the base wants [3, 64]"},
    };
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.o_proj", 2, 64, 64);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        refuses("llama", bad[i].config, &image, bad[i].status, bad[i].word);
    image_free(&image);
}

static void tensors_without_a_place_are_refused_by_name(void **state)
{
    (void)state;
    static const char *const names[] = {
        "model.layers.0.self_attn.q_proj.lora_A.weight", /* without PEFT's prefix */
        LAYERS "0.self_attn.w_proj.lora_A.weight",
        LAYERS "0.self_attn.q_proj.lora_A.default.weight",
        LAYERS "0.self_attn.q_proj.lora_E",
        LAYERS "0.self_attn.q_proj.weight",
        LAYERS "0.self_attn.q_proj.bias",
        LAYERS "0.input_layernorm.weight",
        LAYERS "0.input_layernorm.lora_A.weight",
        LAYERS "00.self_attn.q_proj.lora_A.weight",
        LAYERS "x.self_attn.q_proj.lora_A.weight",
        LAYERS "0.mlp.experts.0.up_proj.lora_A.weight",
        LAYERS "0.self_attn.q_proj.base_layer.lora_A.weight",
        "base_model.model.model.norm.weight",
        "base_model.model.score.weight",
        "base_model.model..lora_A.weight",
        "lora_A.weight",
        ".lora_A.weight",
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        adapter_image image = {0};
        add_lora(&image, LAYERS "0.self_attn.o_proj", 2, 64, 64);
        image_add(&image, names[i], 2, 64, 0);
        refuses("llama", LORA, &image, CHOIR_E_INVALID, names[i]);
        image_free(&image);
    }
}

static void bad_tensors_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *module;
        uint64_t rank, in, out;
        const char *base, *word;
    } bad[] = {
        {"0.self_attn.q_proj", 2, 63, 64, "llama", "has shape [2, 63], the base wants [2, 64]"},
        {"0.self_attn.q_proj", 2, 64, 65, "llama", "has shape [65, 2], the base wants [64, 2]"},
        {"0.self_attn.k_proj", 2, 64, 64, "llama", "has shape [64, 2], the base wants [32, 2]"},
        {"3.self_attn.q_proj", 2, 64, 64, "llama", "is of layer 3, the base has 3 layers"},
        {"4294967295.self_attn.q_proj", 2, 64, 64, "llama", "layer 4294967295"},
        {"4294967296.self_attn.q_proj", 2, 64, 64, "llama", "no place"},
        {"0.block_sparse_moe.experts.8.w1", 2, 64, 96, "mixtral", "expert 8, the base has 8"},
        {"0.mlp.down_proj", 2, 160, 64, "mixtral", "which the base (mixtral) lacks"},
        {"0.self_attn.q_a_proj", 2, 64, 64, "llama", "no place"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        adapter_image image = {0};
        char name[160];
        snprintf(name, sizeof name, LAYERS "%s", bad[i].module);
        add_lora(&image, name, bad[i].rank, bad[i].in, bad[i].out);
        refuses(bad[i].base, LORA, &image, CHOIR_E_INVALID, bad[i].word);
        image_free(&image);
    }
    adapter_image image = {0};
    refuses("llama", LORA, &image, CHOIR_E_INVALID, "holds no tensors");
    image_add(&image, LAYERS "0.self_attn.q_proj.lora_A.weight", 2, 64, 0);
    refuses("llama", LORA, &image, CHOIR_E_INVALID, "no lora_B.weight beside it");
    snprintf(image.tensors[0].name, IMAGE_MAX_NAME, LAYERS "0.self_attn.q_proj.lora_B.weight");
    refuses("llama", LORA, &image, CHOIR_E_INVALID, "no lora_A.weight beside it");
    image_free(&image);
}

static void numbers_that_are_none_are_refused(void **state)
{
    (void)state;
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < 3; i++)
        for (size_t t = 0; t < 2; t++) {
            adapter_image image = {0};
            choir_adapter_data *d;
            add_lora(&image, LAYERS "0.self_attn.q_proj", 2, 64, 64);
            image.tensors[t].values[127] = bad[i];
            image_safetensors(&image);
            const choir_adapter_source s = source_of(LORA, &image);
            says(choir_adapter_data_parse(base_of("llama"), &s, &d), CHOIR_E_DATA_LOSS,
                 t == 0 ? "q_proj.lora_A.weight' holds NaN" : "q_proj.lora_B.weight' holds NaN");
            image_free(&image);
        }
}

static void other_types_are_refused(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "0.self_attn.q_proj", 2, 64, 64);
    image_safetensors(&image);
    char *f32 = memmem(image.bytes, image.n_bytes, "F32", 3);
    memcpy(f32, "I32", 3);
    choir_adapter_data *d;
    const choir_adapter_source s = source_of(LORA, &image);
    says(choir_adapter_data_parse(base_of("llama"), &s, &d), CHOIR_E_UNIMPLEMENTED, "type I32");
    image_free(&image);
}

static void files_cut_short_are_refused(void **state)
{
    (void)state;
    adapter_image image = {0};
    choir_adapter_data *d;
    add_lora(&image, LAYERS "0.self_attn.q_proj", 2, 64, 64);
    image_safetensors(&image);
    choir_adapter_source s = source_of(LORA, &image);
    for (size_t n = 0; n < image.n_bytes; n += n < 12 ? 1 : 37) {
        s.tensor_bytes = n;
        says(choir_adapter_data_parse(base_of("llama"), &s, &d), CHOIR_E_FORMAT, "here");
    }
    /* A header whose file is too short for its tensors, or shorter than what is given of it. */
    s.tensor_bytes = image.header_bytes;
    says(choir_adapter_data_check(base_of("llama"), &s, image.n_bytes - 1, &d), CHOIR_E_FORMAT,
         "truncated");
    says(choir_adapter_data_check(base_of("llama"), &s, 8, &d), CHOIR_E_INVALID,
         "here has 8 bytes");
    image_free(&image);
}

static void digests_tell_every_byte(void **state)
{
    (void)state;
    adapter_image image = {0};
    choir_adapter_data *d;
    add_lora(&image, LAYERS "0.self_attn.q_proj", 2, 64, 64);
    d = reads("llama", LORA, &image);
    uint64_t first = d->digest;
    choir_adapter_data_free(d);
    d = reads("llama", LORA, &image);
    assert_true(d->digest == first && first != 0);
    choir_adapter_data_free(d);
    d = reads("llama", "{\"peft_type\": \"LORA\", \"r\": 2, \"lora_alpha\": 7}", &image);
    assert_true(d->digest != first);
    choir_adapter_data_free(d);
    image.tensors[1].values[127] += 1;
    d = reads("llama", LORA, &image);
    assert_true(d->digest != first);
    choir_adapter_data_free(d);
    image_free(&image);
}

/* -- folders -- */

static char folder[64];

static void put_file(const char *name, const void *data, size_t bytes)
{
    char path[160];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    assert_true(f != NULL && fwrite(data, 1, bytes, f) == bytes && fclose(f) == 0);
}

static void remove_file(const char *name)
{
    char path[160];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    assert_int_equal(unlink(path), 0);
}

static void opens(choir_status expected, const char *word)
{
    choir_adapter_data *d;
    choir_status status = choir_adapter_data_open(base_of("llama"), folder, &d);
    if (status != expected || strstr(choir_error_message(), word) == NULL)
        fail_msg("status %d for %d: '%s' does not say '%s'", status, expected,
                 choir_error_message(), word);
}

static void folders_are_read_and_pickles_refused(void **state)
{
    (void)state;
    choir_adapter_data *d;
    adapter_image image = {0};
    snprintf(folder, sizeof folder, "/tmp/choir-adapter-XXXXXX");
    assert_non_null(mkdtemp(folder));
    opens(CHOIR_E_NOT_FOUND, "adapter_config.json");
    put_file("adapter_config.json", LORA, strlen(LORA));
    opens(CHOIR_E_NOT_FOUND, "adapter_model.safetensors");
    static const char *const pickles[] = {"adapter_model.bin", "pytorch_adapter.bin"};
    for (size_t i = 0; i < 2; i++) {
        put_file(pickles[i], "", 0);
        opens(CHOIR_E_UNIMPLEMENTED, pickles[i]);
        assert_non_null(strstr(choir_error_message(), "pickle"));
        remove_file(pickles[i]);
    }
    add_lora(&image, LAYERS "0.self_attn.q_proj", 2, 64, 64);
    image_safetensors(&image);
    put_file("adapter_model.safetensors", image.bytes, image.n_bytes);
    put_file("adapter_model.bin", "", 0); /* beside safetensors nobody looks at it */
    assert_int_equal(choir_adapter_data_open(base_of("llama"), folder, &d), CHOIR_OK);
    const choir_adapter_source s = source_of(LORA, &image);
    choir_adapter_data *again;
    assert_int_equal(choir_adapter_data_parse(base_of("llama"), &s, &again), CHOIR_OK);
    assert_true(d->digest == again->digest);
    choir_adapter_data_free(d);
    choir_adapter_data_free(again);
    remove_file("adapter_config.json");
    opens(CHOIR_E_NOT_FOUND, "adapter_config.json");
    remove_file("adapter_model.bin");
    remove_file("adapter_model.safetensors");
    assert_int_equal(rmdir(folder), 0);
    opens(CHOIR_E_NOT_FOUND, folder);
    char *longest = malloc(8192);
    memset(longest, 'a', 8191);
    longest[8191] = '\0';
    assert_int_equal(choir_adapter_data_open(base_of("llama"), longest, &d), CHOIR_E_INVALID);
    free(longest);
    image_free(&image);
}

/* Every allocation fails once. */
static void lack_of_memory_is_told(void **state)
{
    (void)state;
    adapter_image image = {0};
    add_lora(&image, LAYERS "1.mlp.experts.base_layer", 2 * 8, 64, 192);
    add_lora(&image, LAYERS "1.mlp.experts", 2 * 8, 96, 64);
    add_lora(&image, LAYERS "0.self_attn.q_proj", 2, 64, 64);
    image_safetensors(&image);
    const char *config = STACKED TARGETS ", \"alpha_pattern\": {\"[a-z]_proj\": 4}}";
    const choir_adapter_source s = source_of(config, &image);
    const choir_model_config *base = base_of("mixtral");
    choir_adapter_data *d = NULL;
    size_t before = choir_memory_bytes(CHOIR_MEM_OTHER);
    uint32_t n_failed = 0;
    for (uint64_t at = 1;; at++) {
        choir_memory_fail_at(at);
        choir_status status = choir_adapter_data_parse(base, &s, &d);
        choir_memory_fail_at(0);
        if (status == CHOIR_OK) break;
        assert_int_equal(status, CHOIR_E_NO_MEMORY);
        assert_int_equal(choir_memory_bytes(CHOIR_MEM_OTHER), before);
        n_failed++;
    }
    assert_true(n_failed > 20);
    choir_adapter_data_free(d);
    assert_int_equal(choir_memory_bytes(CHOIR_MEM_OTHER), before);
    image_free(&image);
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
        cmocka_unit_test(lora_is_found_by_name_and_scaled),
        cmocka_unit_test(rows_of_q_and_k_lie_as_the_base_has_them),
        cmocka_unit_test(dora_needs_its_magnitudes),
        cmocka_unit_test(biases_of_b_are_read),
        cmocka_unit_test(fused_modules_share_a_and_cut_b),
        cmocka_unit_test(experts_are_found_one_by_one),
        cmocka_unit_test(routers_have_the_names_of_both_transformers),
        cmocka_unit_test(stacked_experts_are_taken_apart),
        cmocka_unit_test(interleaved_experts_are_taken_apart),
        cmocka_unit_test(experts_that_peft_turned_are_turned_back),
        cmocka_unit_test(square_experts_follow_the_version),
        cmocka_unit_test(stacked_experts_need_their_targets),
        cmocka_unit_test(tables_are_adapted_by_rows),
        cmocka_unit_test(latent_attention_is_adapted_head_by_head),
        cmocka_unit_test(models_that_see_have_their_text_below_another_name),
        cmocka_unit_test(invocations_are_read),
        cmocka_unit_test(settings_that_mean_something_else_are_refused),
        cmocka_unit_test(configurations_that_are_none_are_refused),
        cmocka_unit_test(tensors_without_a_place_are_refused_by_name),
        cmocka_unit_test(bad_tensors_are_refused),
        cmocka_unit_test(numbers_that_are_none_are_refused),
        cmocka_unit_test(other_types_are_refused),
        cmocka_unit_test(files_cut_short_are_refused),
        cmocka_unit_test(digests_tell_every_byte),
        cmocka_unit_test(folders_are_read_and_pickles_refused),
        cmocka_unit_test(lack_of_memory_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, tear_down);
}
