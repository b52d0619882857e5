#include "tune/gguf_out.h"

#include "engine/gguf.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { ALIGNMENT = 32 };
/* The kinds of metadata values, numbered as in the file. */
enum kind { U32 = 4, F32 = 6, STRING = 8, ARRAY = 9 };

/* The head of the file is built in memory; tensors follow it as they are made. */
typedef struct head {
    uint8_t *data;
    size_t n, capacity;
    uint64_t n_keys;
    bool failed; /* out of memory; found once at the end */
} head;

static void put(head *h, const void *data, size_t bytes)
{
    if (h->failed) return;
    if (bytes > h->capacity - h->n) {
        size_t capacity = 2 * h->capacity + bytes + 4096;
        void *grown = choir_realloc(CHOIR_MEM_TUNE, h->data, capacity);
        if (grown == NULL) {
            h->failed = true;
            return;
        }
        h->data = grown;
        h->capacity = capacity;
    }
    memcpy(h->data + h->n, data, bytes);
    h->n += bytes;
}

static void put_u32(head *h, uint32_t v)
{
    put(h, &v, sizeof v);
}
static void put_u64(head *h, uint64_t v)
{
    put(h, &v, sizeof v);
}
static void put_text(head *h, const char *data, size_t bytes)
{
    put_u64(h, bytes);
    put(h, data, bytes);
}

static void put_key(head *h, const char *key, enum kind kind)
{
    put_text(h, key, strlen(key));
    put_u32(h, kind);
    h->n_keys++;
}

static void put_string(head *h, const char *key, const char *data, size_t bytes)
{
    put_key(h, key, STRING);
    put_text(h, data, bytes);
}

static void put_count(head *h, const char *key, uint32_t value)
{
    put_key(h, key, U32);
    put_u32(h, value);
}

static void put_real(head *h, const char *key, float value)
{
    put_key(h, key, F32);
    put(h, &value, sizeof value);
}

static bool begins(choir_text text, const char *start)
{
    size_t n = strlen(start);
    return text.bytes >= n && memcmp(text.data, start, n) == 0;
}

/* The tokenizer, the template, the licence, as they lie; not what put_shape says anew. */
static bool is_kept(choir_text key)
{
    static const char *const own[] = {"general.architecture",
                                      "general.type",
                                      "general.name",
                                      "general.file_type",
                                      "general.quantization_version",
                                      "general.alignment",
                                      "general.size_label"};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (key.bytes == strlen(own[i]) && begins(key, own[i])) return false;
    return begins(key, "tokenizer.") || begins(key, "general.");
}

static void put_kept(head *h, const choir_gguf *base)
{
    for (uint64_t i = 0; i < choir_gguf_n_entries(base); i++) {
        choir_text key, raw;
        choir_gguf_entry_at(base, i, &key, &raw);
        if (!is_kept(key)) continue;
        put(h, raw.data, raw.bytes);
        h->n_keys++;
    }
}

/* llama.cpp's number for "mostly this type". */
static uint32_t file_type(choir_dtype dtype)
{
    return dtype == CHOIR_Q8_0 ? 7 : dtype == CHOIR_Q4_1 ? 3 : dtype == CHOIR_BF16 ? 32 : 1;
}

static void put_names(head *h, const choir_tune_moe *moe)
{
    char name[256];
    int n = snprintf(name, sizeof name, "%.100s with experts", moe->config->name);
    for (uint32_t e = 1; e < moe->n_experts && n < (int)sizeof name; e++)
        n += snprintf(name + n, sizeof name - (size_t)n, "%s %s", e > 1 ? "," : "", moe->names[e]);
    put_string(h, "general.name", name, strlen(name));
    put_key(h, "choir.expert_names", ARRAY);
    put_u32(h, STRING);
    put_u64(h, moe->n_experts);
    for (uint32_t e = 0; e < moe->n_experts; e++) put_text(h, moe->names[e], strlen(moe->names[e]));
}

static void put_shape(head *h, const choir_tune_moe *moe, choir_dtype dtype)
{
    const choir_model_config *c = moe->config;
    put_string(h, "general.architecture", "llama", 5);
    put_string(h, "general.type", "model", 5);
    put_names(h, moe);
    put_count(h, "general.file_type", file_type(dtype));
    put_count(h, "general.quantization_version", 2);
    put_count(h, "general.alignment", ALIGNMENT);
    put_count(h, "llama.block_count", c->n_layers);
    put_count(h, "llama.context_length", c->max_positions);
    put_count(h, "llama.embedding_length", c->hidden);
    put_count(h, "llama.feed_forward_length", c->ffn_hidden);
    put_count(h, "llama.attention.head_count", c->n_heads);
    put_count(h, "llama.attention.head_count_kv", c->n_kv_heads);
    put_count(h, "llama.attention.key_length", c->head_dim);
    put_count(h, "llama.attention.value_length", c->head_dim);
    put_real(h, "llama.attention.layer_norm_rms_epsilon", c->norm_eps);
    put_count(h, "llama.rope.dimension_count", c->rope.rotary_dims);
    put_real(h, "llama.rope.freq_base", c->rope.theta);
    if (c->rope.scaling == CHOIR_ROPE_LINEAR) {
        put_string(h, "llama.rope.scaling.type", "linear", 6);
        put_real(h, "llama.rope.scaling.factor", c->rope.factor);
    }
    if (c->sliding_window > 0) put_count(h, "llama.attention.sliding_window", c->sliding_window);
    put_count(h, "llama.vocab_size", c->vocab);
    put_count(h, "llama.expert_count", moe->n_experts);
    put_count(h, "llama.expert_used_count", moe->top_k);
}

static uint64_t align(uint64_t n)
{
    return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Names, dimensions (fastest first), types and offsets. */
static void put_tensors(head *h, const choir_tune_plan *plan)
{
    uint64_t offset = 0;
    for (size_t i = 0; i < plan->n; i++) {
        const choir_tune_tensor *t = &plan->items[i];
        const uint64_t dims[3] = {t->cols, t->rows, t->n_slices};
        uint32_t n_dims = t->vector ? 1 : t->n_slices > 1 ? 3 : 2;
        put_text(h, t->name, strlen(t->name));
        put_u32(h, n_dims);
        put(h, dims, n_dims * sizeof *dims);
        put_u32(h, choir_dtype_gguf(t->dtype));
        put_u64(h, offset);
        offset = align(offset + t->bytes);
    }
}

static choir_status make_head(const choir_tune_moe *moe, choir_dtype dtype,
                              const choir_tune_plan *plan, head *h)
{
    const choir_gguf *base = choir_model_file_gguf(moe->base);
    put(h, "GGUF", 4);
    put_u32(h, 3);
    put_u64(h, plan->n);
    size_t keys_at = h->n;
    put_u64(h, 0);
    put_shape(h, moe, dtype);
    put_kept(h, base);
    put_tensors(h, plan);
    static const uint8_t zeros[ALIGNMENT];
    put(h, zeros, align(h->n) - h->n);
    if (h->failed) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the head of a GGUF file");
    memcpy(h->data + keys_at, &h->n_keys, sizeof h->n_keys);
    return CHOIR_OK;
}

static choir_status write_all(choir_tune_writer *w, const choir_tune_plan *plan, const head *h,
                              choir_save *save)
{
    static const uint8_t zeros[ALIGNMENT];
    CHOIR_TRY(choir_save_write(save, h->data, h->n));
    for (size_t i = 0; i < plan->n; i++) {
        CHOIR_TRY(choir_tune_write(w, &plan->items[i], save));
        uint64_t bytes = plan->items[i].bytes;
        CHOIR_TRY(choir_save_write(save, zeros, align(bytes) - bytes));
    }
    return CHOIR_OK;
}

static choir_status save_all(const choir_tune_moe *moe, const choir_tune_plan *plan, const head *h,
                             const char *path, uint32_t n_threads, bool show_progress)
{
    choir_tune_writer writer;
    choir_save save;
    char what[128];
    const char *slash = strrchr(path, '/');
    snprintf(what, sizeof what, "writing %.100s", slash == NULL ? path : slash + 1);
    CHOIR_TRY(choir_tune_check_space(path, plan->bytes + h->n));
    CHOIR_TRY(choir_tune_writer_create(moe, plan, n_threads, &writer));
    choir_status status = choir_save_begin(path, &save);
    if (status == CHOIR_OK) {
        choir_progress_begin(&writer.progress, what, CHOIR_PROGRESS_BYTES, plan->bytes);
        writer.progress.quiet = !show_progress;
        status = write_all(&writer, plan, h, &save);
        choir_progress_end(&writer.progress);
        if (status == CHOIR_OK)
            status = choir_save_commit(&save);
        else
            choir_save_abandon(&save);
    }
    choir_tune_writer_destroy(&writer);
    return status;
}

choir_status choir_tune_write_gguf(const choir_tune_moe *moe, choir_dtype dtype, const char *path,
                                   uint32_t n_threads, bool show_progress)
{
    if (choir_model_file_gguf(moe->base) == NULL)
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "%s is a folder, whose tokenizer Choir cannot write as GGUF; name a folder "
            "as the output, or a .gguf file as the base",
            choir_model_file_path(moe->base));
    choir_tune_plan plan;
    head h = {0};
    CHOIR_TRY(choir_tune_plan_make(moe, dtype, true, &plan));
    choir_status status = make_head(moe, dtype, &plan, &h);
    if (status == CHOIR_OK) status = save_all(moe, &plan, &h, path, n_threads, show_progress);
    choir_free(h.data);
    choir_tune_plan_free(&plan);
    return status;
}
