/* The steps of upcycling: check, read the adapters, make the gates, write. */
#include "tune/tune.h"

#include "engine/families/families.h"
#include "tune/encode.h"
#include "tune/folder_out.h"
#include "tune/gates.h"
#include "tune/gguf_out.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { MAX_EXPERTS = CHOIR_MAX_UPCYCLE_ADAPTERS + 1 };

typedef struct job {
    const choir_upcycle_options *options;
    bool gguf;
    choir_dtype dtype;
    uint32_t n_threads;
    choir_model_file *base;
    choir_tune_moe moe;
    const char *names[MAX_EXPERTS], *texts[MAX_EXPERTS], *folders[MAX_EXPERTS];
    choir_tune_adapter adapters[MAX_EXPERTS];
} job;

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n > m && strcmp(text + n - m, end) == 0;
}

static choir_status check_name(const choir_upcycle_options *o, uint32_t i)
{
    static const char good[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    const char *name = o->experts[i].name;
    size_t n = strlen(name);
    if (n == 0 || n > 64 || name[strspn(name, good)] != '\0')
        return choir_fail(CHOIR_E_INVALID,
                          "the expert's name \"%.80s\" must have 1 to 64 letters, digits, '.', '_' "
                          "or '-'",
                          name);
    bool taken = strcmp(name, "base") == 0;
    for (uint32_t k = 0; k < i; k++) taken = taken || strcmp(name, o->experts[k].name) == 0;
    return taken ? choir_fail(CHOIR_E_INVALID, "two experts have the name \"%s\"", name) : CHOIR_OK;
}

static choir_status check_dtype(job *j)
{
    choir_dtype d = j->options->dtype;
    j->dtype = d != CHOIR_N_DTYPES ? d : j->gguf ? CHOIR_Q8_0 : CHOIR_BF16;
    bool good = choir_tune_can_encode(j->dtype) && choir_dtype_in_gguf(j->dtype);
    if (j->gguf)
        good = good && j->dtype != CHOIR_F32;
    else
        good = good && choir_dtype_block_elements(j->dtype) == 1;
    if (good) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID, "%s cannot be written as %s; it can be %s", j->options->out,
                      j->dtype < CHOIR_N_DTYPES ? choir_dtype_text(j->dtype) : "an unknown type",
                      j->gguf ? "Q8_0, Q4_1, F16 or BF16" : "BF16, F16 or F32");
}

static choir_status check_options(job *j)
{
    const choir_upcycle_options *o = j->options;
    if (o->base == NULL || o->out == NULL || o->out[0] == '\0' || strlen(o->out) > 3900)
        return choir_fail(CHOIR_E_INVALID, "upcycling wants a base and the name of an output");
    if (o->n_experts < 1 || o->n_experts > CHOIR_MAX_UPCYCLE_ADAPTERS)
        return choir_fail(CHOIR_E_INVALID, "%u adapters were given, must be 1 to %d", o->n_experts,
                          CHOIR_MAX_UPCYCLE_ADAPTERS);
    if (o->top_k < 1 || o->top_k > o->n_experts + 1)
        return choir_fail(CHOIR_E_INVALID,
                          "%u experts per token, must be 1 to %u (the base and %u "
                          "adapters)",
                          o->top_k, o->n_experts + 1, o->n_experts);
    if (!(o->temperature > 0 && o->temperature <= 1000))
        return choir_fail(CHOIR_E_INVALID,
                          "the gates' temperature is %g, must be over 0 and at most "
                          "1000",
                          (double)o->temperature);
    if (o->shard_bytes == 0) return choir_fail(CHOIR_E_INVALID, "shards of 0 bytes");
    for (uint32_t i = 0; i < o->n_experts; i++) CHOIR_TRY(check_name(o, i));
    if (o->gates == CHOIR_GATES_HIDDEN) {
        if (o->base_sample_text == NULL)
            return choir_fail(CHOIR_E_INVALID, "no sample text for the base");
        for (uint32_t i = 0; i < o->n_experts; i++)
            if (o->experts[i].sample_text == NULL)
                return choir_fail(CHOIR_E_INVALID, "no sample text for the expert \"%s\"",
                                  o->experts[i].name);
    }
    j->gguf = ends_with(o->out, ".gguf");
    if (!j->gguf && access(o->out, F_OK) == 0)
        return choir_fail(CHOIR_E_EXISTS, "%s is there already; remove it or name another", o->out);
    return check_dtype(j);
}

/* Llama's attention and residual stream, without anything that Mixtral cannot say. */
static bool is_plain(const choir_model_config *c)
{
    for (uint32_t l = 0; l < c->n_layers; l++)
        if ((c->layers[l] & ~CHOIR_LAYER_WINDOW) != 0) return false;
    bool plain_rope = c->rope.scaling == CHOIR_ROPE_NONE || c->rope.scaling == CHOIR_ROPE_LINEAR ||
                      c->rope.scaling == CHOIR_ROPE_LLAMA3;
    return (c->roles & ~CHOIR_ROLE_BIT(ROPE_FACTORS)) == 0 && plain_rope && !choir_is_latent(c) &&
           c->activation == CHOIR_SWIGLU && !c->layer_norm && c->qk_norm == CHOIR_QK_NORM_NONE &&
           c->embedding_scale == 1 && c->residual_scale == 1 && c->logit_divisor == 1 &&
           c->logit_softcap == 0 && c->attention_softcap == 0 && c->window_rope.theta == 0 &&
           fabsf(c->attention_scale * sqrtf((float)c->head_dim) - 1) < 1e-6F;
}

/* The mixture is written as Mixtral, so the base must be what Mixtral's other parts are. */
static choir_status check_base(const choir_model_file *base)
{
    const choir_model_config *c = choir_model_file_config(base);
    if (c->n_experts > 0)
        return choir_fail(CHOIR_E_INVALID,
                          "%s is a mixture of %u experts already; the base must be "
                          "dense",
                          choir_model_file_path(base), c->n_experts);
    if (!is_plain(c))
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "%s is of the family %s, which Mixtral cannot express; bases are llama "
            "and mistral",
            choir_model_file_path(base), c->family->name);
    if (c->rope.rotary_dims != c->head_dim)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s turns %u of %u dimensions, which Mixtral does "
                          "not",
                          choir_model_file_path(base), c->rope.rotary_dims, c->head_dim);
    return CHOIR_OK;
}

static choir_status read_parts(job *j)
{
    const choir_upcycle_options *o = j->options;
    CHOIR_TRY(choir_model_file_open(o->base, &j->base));
    CHOIR_TRY(check_base(j->base));
    const choir_model_config *config = choir_model_file_config(j->base);
    j->names[0] = "base";
    j->texts[0] = o->base_sample_text;
    for (uint32_t i = 0; i < o->n_experts; i++) {
        j->names[i + 1] = o->experts[i].name;
        j->texts[i + 1] = o->experts[i].sample_text;
        j->folders[i + 1] = o->experts[i].adapter;
        CHOIR_TRY(choir_tune_adapter_open(o->experts[i].adapter, config, &j->adapters[i + 1]));
    }
    j->moe = (choir_tune_moe){.base = j->base,
                              .config = config,
                              .n_experts = o->n_experts + 1,
                              .top_k = o->top_k,
                              .names = j->names,
                              .adapters = j->adapters,
                              .adapter_folders = j->folders};
    return CHOIR_OK;
}

static choir_status make_gates(job *j)
{
    const choir_upcycle_options *o = j->options;
    j->moe.gates = choir_calloc(
        CHOIR_MEM_TUNE, (size_t)j->moe.config->n_layers * j->moe.n_experts * j->moe.config->hidden,
        sizeof *j->moe.gates);
    if (j->moe.gates == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the gates");
    if (o->gates == CHOIR_GATES_UNIFORM) return CHOIR_OK;
    return choir_tune_gates_from_texts(o->base, j->texts, j->moe.n_experts, o->temperature,
                                       j->n_threads, o->show_progress, j->moe.gates);
}

static choir_status write_out(const job *j)
{
    const choir_upcycle_options *o = j->options;
    if (j->gguf)
        return choir_tune_write_gguf(&j->moe, j->dtype, o->out, j->n_threads, o->show_progress);
    const choir_tune_folder folder = {.path = o->out,
                                      .dtype = j->dtype,
                                      .shard_bytes = o->shard_bytes,
                                      .n_threads = j->n_threads,
                                      .show_progress = o->show_progress};
    return choir_tune_write_folder(&j->moe, &folder);
}

choir_status choir_upcycle(const choir_upcycle_options *options)
{
    job j = {.options = options, .n_threads = options->n_threads};
    if (j.n_threads == 0) j.n_threads = choir_workers_best();
    choir_status status;
    CHOIR_TRY_TO(done, status, check_options(&j));
    CHOIR_TRY_TO(done, status, read_parts(&j));
    CHOIR_TRY_TO(done, status, make_gates(&j));
    status = write_out(&j);
done:
    choir_free(j.moe.gates);
    for (uint32_t e = 0; e < MAX_EXPERTS; e++) choir_tune_adapter_close(&j.adapters[e]);
    choir_model_file_close(j.base);
    return status;
}
