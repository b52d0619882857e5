#include "tune/hf_files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PATH_BYTES = 4096, MAX_COPY_BYTES = 64 << 20 };

choir_status choir_tune_save_text(const char *folder, const char *name, const char *text,
                                  size_t bytes)
{
    char path[MAX_PATH_BYTES];
    choir_save save;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    CHOIR_TRY(choir_save_begin(path, &save));
    choir_status status = choir_save_write(&save, text, bytes);
    if (status == CHOIR_OK) return choir_save_commit(&save);
    choir_save_abandon(&save);
    return status;
}

choir_status choir_tune_save_json(const char *folder, const char *name, json_t *json)
{
    char *text = json == NULL ? NULL : json_dumps(json, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    json_decref(json);
    if (text == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory to write %s", name);
    choir_status status = choir_tune_save_text(folder, name, text, strlen(text));
    free(text);
    return status;
}

static void give_up_if(bool failed, json_t **whole)
{
    if (!failed) return;
    json_decref(*whole);
    *whole = NULL;
}

void choir_tune_json_set(json_t **object, const char *key, json_t *value)
{
    give_up_if(json_object_set_new(*object, key, value) != 0, object);
}

void choir_tune_json_append(json_t **array, json_t *value)
{
    give_up_if(json_array_append_new(*array, value) != 0, array);
}

choir_status choir_tune_copy_file(const char *from_folder, const char *from, const char *folder,
                                  const char *name)
{
    char path[MAX_PATH_BYTES], *text;
    size_t bytes;
    if (snprintf(path, sizeof path, "%s/%s", from_folder, from) >= (int)sizeof path ||
        !choir_file_exists(path))
        return CHOIR_OK;
    CHOIR_TRY(choir_file_read(path, MAX_COPY_BYTES, &text, &bytes));
    choir_status status = choir_tune_save_text(folder, name, text, bytes);
    choir_free(text);
    return status;
}

choir_status choir_tune_save_header(choir_save *save, const char *name, json_t *header,
                                    uint64_t *bytes)
{
    char *text = header == NULL ? NULL : json_dumps(header, JSON_COMPACT);
    json_decref(header);
    if (text == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the header of %s", name);
    uint64_t n = strlen(text), padded = (n + 7) / 8 * 8;
    choir_status status = choir_save_write(save, &padded, sizeof padded);
    if (status == CHOIR_OK) status = choir_save_write(save, text, n);
    if (status == CHOIR_OK) status = choir_save_write(save, "        ", padded - n);
    free(text);
    *bytes = sizeof padded + padded;
    return status;
}

static json_t *id_or_null(int32_t id)
{
    return id < 0 ? json_null() : json_integer(id);
}

static json_t *eos_of(const choir_model_config *c)
{
    if (c->n_eos <= 1) return id_or_null(c->n_eos == 1 ? c->eos_ids[0] : -1);
    json_t *ids = json_array();
    for (uint32_t i = 0; i < c->n_eos; i++)
        choir_tune_json_append(&ids, json_integer(c->eos_ids[i]));
    return ids;
}

/* A float's shortest decimal, so that 1e-05 is not 9.99999975e-06. */
static json_t *real_of(float value)
{
    char text[32];
    for (int digits = 1; digits <= 9; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, (double)value);
        if (strtof(text, NULL) == value) break;
    }
    return json_real(strtod(text, NULL));
}

static json_t *rope_of(const choir_rope_config *r)
{
    static const char *const types[] = {"default", "linear", "llama3"};
    json_t *rope =
        json_pack("{s:o, s:s}", "rope_theta", real_of(r->theta), "rope_type", types[r->scaling]);
    if (r->scaling != CHOIR_ROPE_NONE) choir_tune_json_set(&rope, "factor", real_of(r->factor));
    if (r->scaling == CHOIR_ROPE_LLAMA3) {
        choir_tune_json_set(&rope, "low_freq_factor", real_of(r->low_freq_factor));
        choir_tune_json_set(&rope, "high_freq_factor", real_of(r->high_freq_factor));
        choir_tune_json_set(&rope, "original_max_position_embeddings",
                            json_integer(r->original_max_positions));
    }
    return rope;
}

/* Both spellings: rope_theta and torch_dtype for what came before transformers 5. */
static json_t *config_of(const choir_tune_moe *moe, choir_dtype dtype)
{
    const choir_model_config *c = moe->config;
    const char *type = dtype == CHOIR_BF16  ? "bfloat16"
                       : dtype == CHOIR_F16 ? "float16"
                                            : "float32";
    json_t *names = json_array();
    for (uint32_t e = 0; e < moe->n_experts; e++)
        choir_tune_json_append(&names, json_string(moe->names[e]));
    json_t *j = json_pack(
        "{s:[s], s:s, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:i, s:s, s:f, s:b, s:b, s:f, s:f}",
        "architectures", "MixtralForCausalLM", "model_type", "mixtral", "hidden_size",
        (int)c->hidden, "intermediate_size", (int)c->ffn_hidden, "num_hidden_layers",
        (int)c->n_layers, "num_attention_heads", (int)c->n_heads, "num_key_value_heads",
        (int)c->n_kv_heads, "head_dim", (int)c->head_dim, "num_local_experts", (int)moe->n_experts,
        "num_experts_per_tok", (int)moe->top_k, "hidden_act", "silu", "attention_dropout", 0.0,
        "output_router_logits", 0, "use_cache", 1, "router_aux_loss_coef", 0.001,
        "router_jitter_noise", 0.0);
    if (j == NULL) {
        json_decref(names);
        return NULL;
    }
    choir_tune_json_set(&j, "vocab_size", json_integer(c->vocab));
    choir_tune_json_set(&j, "max_position_embeddings", json_integer(c->max_positions));
    choir_tune_json_set(&j, "rms_norm_eps", real_of(c->norm_eps));
    choir_tune_json_set(&j, "rope_theta", real_of(c->rope.theta));
    choir_tune_json_set(&j, "rope_parameters", rope_of(&c->rope));
    if (c->rope.scaling != CHOIR_ROPE_NONE)
        choir_tune_json_set(&j, "rope_scaling", rope_of(&c->rope));
    choir_tune_json_set(&j, "sliding_window",
                        c->sliding_window == 0 ? json_null() : json_integer(c->sliding_window));
    choir_tune_json_set(&j, "tie_word_embeddings", json_boolean(c->tied_head));
    choir_tune_json_set(&j, "bos_token_id", id_or_null(c->bos_id));
    choir_tune_json_set(&j, "eos_token_id", eos_of(c));
    choir_tune_json_set(&j, "pad_token_id", id_or_null(c->pad_id));
    choir_tune_json_set(&j, "dtype", json_string(type));
    choir_tune_json_set(&j, "torch_dtype", json_string(type));
    choir_tune_json_set(&j, "choir_expert_names", names);
    return j;
}

static json_t *generation_config_of(const choir_model_config *c)
{
    json_t *j = json_pack("{s:o, s:o, s:o}", "bos_token_id", id_or_null(c->bos_id), "eos_token_id",
                          eos_of(c), "pad_token_id", id_or_null(c->pad_id));
    /* Without do_sample the others are not heeded; a temperature of 0 is its opposite. */
    bool any = c->temperature > 0 || c->top_p > 0 || c->top_k > 0 || c->repetition_penalty > 0;
    if (c->temperature == 0 || any)
        choir_tune_json_set(&j, "do_sample", json_boolean(c->temperature != 0));
    if (c->temperature > 0) choir_tune_json_set(&j, "temperature", real_of(c->temperature));
    if (c->top_p > 0) choir_tune_json_set(&j, "top_p", real_of(c->top_p));
    if (c->top_k > 0) choir_tune_json_set(&j, "top_k", json_integer(c->top_k));
    if (c->repetition_penalty > 0)
        choir_tune_json_set(&j, "repetition_penalty", real_of(c->repetition_penalty));
    return j;
}

/* The parts keep their own licences: each adapter's COPYRIGHT goes along. */
static choir_status save_readme(const choir_tune_moe *moe, const char *folder)
{
    char text[8192];
    const choir_model_config *c = moe->config;
    size_t n =
        (size_t)snprintf(text, sizeof text,
                         "---\nlicense: %.60s\n---\n"
                         "A mixture of %u experts, %u of them per token, made by Choir out of "
                         "%.120s (licence: %.60s)\nand LoRA adapters merged into its MLP. Expert "
                         "0 is the base itself.\n\n| expert | name | notice |\n|---|---|---|\n",
                         c->licence[0] == '\0' ? "other" : c->licence, moe->n_experts, moe->top_k,
                         c->name, c->licence[0] == '\0' ? "not stated" : c->licence);
    for (uint32_t e = 0; e < moe->n_experts && n < sizeof text - 200; e++) {
        char path[MAX_PATH_BYTES];
        snprintf(path, sizeof path, "%.3900s/COPYRIGHT.%s", folder, moe->names[e]);
        n += (size_t)snprintf(text + n, sizeof text - n, "| %u | %s | %s%s |\n", e, moe->names[e],
                              choir_file_exists(path) ? "COPYRIGHT." : "",
                              choir_file_exists(path) ? moe->names[e] : "");
    }
    return choir_tune_save_text(folder, "README.md", text, n);
}

static choir_status copy_notices(const choir_tune_moe *moe, const char *folder)
{
    for (uint32_t e = 1; e < moe->n_experts; e++) {
        char name[128];
        snprintf(name, sizeof name, "COPYRIGHT.%s", moe->names[e]);
        CHOIR_TRY(choir_tune_copy_file(moe->adapter_folders[e], "COPYRIGHT", folder, name));
    }
    return CHOIR_OK;
}

choir_status choir_tune_save_hf_files(const choir_tune_moe *moe, choir_dtype dtype,
                                      const char *folder)
{
    static const char *const copied[] = {"tokenizer.json", "tokenizer_config.json",
                                         "special_tokens_map.json", "LICENSE"};
    const choir_gguf *gguf = choir_model_file_gguf(moe->base);
    CHOIR_TRY(choir_tune_save_json(folder, "config.json", config_of(moe, dtype)));
    CHOIR_TRY(
        choir_tune_save_json(folder, "generation_config.json", generation_config_of(moe->config)));
    const char *chat = choir_model_file_chat_template(moe->base);
    if (chat != NULL)
        CHOIR_TRY(choir_tune_save_text(folder, "chat_template.jinja", chat, strlen(chat)));
    if (gguf != NULL)
        CHOIR_TRY(choir_tune_save_tokenizer(gguf, moe->config->max_positions, folder));
    for (size_t i = 0; gguf == NULL && i < sizeof copied / sizeof *copied; i++)
        CHOIR_TRY(choir_tune_copy_file(choir_model_file_path(moe->base), copied[i], folder, copied[i]));
    CHOIR_TRY(copy_notices(moe, folder));
    return save_readme(moe, folder);
}
