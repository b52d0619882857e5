/* A dense GGUF and adapters to a mixture of experts, as llama.cpp writes Mixtral: architecture "llama" with
 * experts stacked in three tensors a layer. Everything but the MLP is copied as it lies. */
#include "tune/gates.h"
#include "tune/gguf_writer.h"
#include "tune/lora.h"
#include "tune/quantize.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct upcycle {
    const choir_upcycle_options *o;
    choir_model_file *file;
    const choir_gguf *gguf;
    const choir_model_config *c;
    lora *adapters; /* [n_experts] */
    float *gates;   /* [n_layers, n_experts + 1, hidden] */
    gguf_writer w;
    float *row;
    uint8_t *packed;
} upcycle;

static const choir_role part_roles[MLP_PARTS] = {CHOIR_ROLE_FFN_GATE, CHOIR_ROLE_FFN_UP,
                                                 CHOIR_ROLE_FFN_DOWN};
static const char *const part_names[MLP_PARTS] = {"gate", "up", "down"};

static choir_status check_options(const choir_upcycle_options *o)
{
    size_t n = strlen(o->out);
    if (n < 6 || strcmp(o->out + n - 5, ".gguf") != 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "the output is '%.200s'; upcycle writes .gguf files, folders are not there yet",
                          o->out);
    if (o->n_experts == 0 || o->n_experts > CHOIR_MAX_UPCYCLE_EXPERTS)
        return choir_fail(CHOIR_E_INVALID, "%u experts, must be 1 to %d", o->n_experts,
                          CHOIR_MAX_UPCYCLE_EXPERTS);
    if (o->top_k == 0 || o->top_k > o->n_experts + 1)
        return choir_fail(CHOIR_E_INVALID, "%u experts per token of %u", o->top_k, o->n_experts + 1);
    if (!can_quantize(o->quant))
        return choir_fail(CHOIR_E_INVALID, "experts cannot be written as %s", choir_dtype_text(o->quant));
    if (!(o->sharpness > 0 && o->sharpness < 1e6))
        return choir_fail(CHOIR_E_INVALID, "the gates' sharpness is %g", o->sharpness);
    for (uint32_t i = 0; i < o->n_experts; i++)
        if (o->gates == CHOIR_GATES_HIDDEN && (o->experts[i].sample == NULL || o->base_sample == NULL))
            return choir_fail(CHOIR_E_INVALID, "expert '%.60s' or the base has no sample text",
                              o->experts[i].name);
    return CHOIR_OK;
}

static choir_status open_base(upcycle *u)
{
    CHOIR_TRY(choir_model_file_open(u->o->base, &u->file));
    u->gguf = choir_model_file_gguf(u->file);
    u->c = choir_model_file_config(u->file);
    if (u->gguf == NULL)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: upcycle reads GGUF bases, folders are not there yet",
                          u->o->base);
    if (strcmp(choir_model_config_family(u->c), "llama") != 0)
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: upcycle takes dense llama models, this is %s",
                          u->o->base, choir_model_config_family(u->c));
    uint32_t block = choir_dtype_block_elements(u->o->quant);
    if (u->c->hidden % block != 0 || u->c->ffn_hidden % block != 0)
        return choir_fail(CHOIR_E_PRECONDITION, "%s: widths %u and %u are no whole blocks of %u",
                          u->o->base, u->c->hidden, u->c->ffn_hidden, block);
    return CHOIR_OK;
}

static bool is_text(choir_text a, const char *b)
{
    return a.bytes == strlen(b) && memcmp(a.data, b, a.bytes) == 0;
}

static choir_status write_metadata(upcycle *u)
{
    char name[512];
    size_t n = (size_t)snprintf(name, sizeof name, "%.100s + ", u->c->name);
    for (uint32_t i = 0; i < u->o->n_experts && n < sizeof name; i++)
        n += (size_t)snprintf(name + n, sizeof name - n, "%s%.40s", i > 0 ? ", " : "",
                              u->o->experts[i].name);
    for (uint64_t i = 0; i < choir_gguf_n_entries(u->gguf); i++) {
        choir_text key, raw;
        choir_gguf_entry_at(u->gguf, i, &key, &raw);
        if (is_text(key, "general.name") || is_text(key, "general.file_type") ||
            is_text(key, "general.alignment"))
            continue;
        CHOIR_TRY(gguf_writer_raw(&u->w, raw.data, raw.bytes));
    }
    CHOIR_TRY(gguf_writer_text(&u->w, "general.name", name));
    CHOIR_TRY(gguf_writer_u32(&u->w, "llama.expert_count", u->o->n_experts + 1));
    return gguf_writer_u32(&u->w, "llama.expert_used_count", u->o->top_k);
}

/* The MLP's tensors of the base become experts, all others stay. */
static bool is_mlp(choir_text name)
{
    static const char *const endings[] = {".ffn_gate.weight", ".ffn_up.weight", ".ffn_down.weight"};
    for (int i = 0; i < 3; i++) {
        size_t n = strlen(endings[i]);
        if (name.bytes > n && memcmp(name.data + name.bytes - n, endings[i], n) == 0) return true;
    }
    return false;
}

static choir_status declare_tensors(upcycle *u)
{
    char name[1100];
    uint64_t hidden = u->c->hidden, ffn = u->c->ffn_hidden, n = u->o->n_experts + 1;
    for (uint64_t i = 0; i < choir_gguf_n_tensors(u->gguf); i++) {
        const choir_gguf_tensor *t = choir_gguf_tensor_at(u->gguf, i);
        if (is_mlp(t->name)) continue;
        snprintf(name, sizeof name, "%.*s", (int)t->name.bytes, t->name.data);
        CHOIR_TRY(gguf_writer_tensor(&u->w, name, t->dtype, t->n_dims, t->dims));
    }
    for (uint32_t l = 0; l < u->c->n_layers; l++) {
        snprintf(name, sizeof name, "blk.%u.ffn_gate_inp.weight", l);
        CHOIR_TRY(gguf_writer_tensor(&u->w, name, CHOIR_F32, 2, (const uint64_t[]){hidden, n}));
        for (int p = 0; p < MLP_PARTS; p++) {
            const uint64_t wide[] = {hidden, ffn, n}, down[] = {ffn, hidden, n};
            snprintf(name, sizeof name, "blk.%u.ffn_%s_exps.weight", l, part_names[p]);
            CHOIR_TRY(gguf_writer_tensor(&u->w, name, u->o->quant, 3, p == MLP_DOWN ? down : wide));
        }
    }
    return CHOIR_OK;
}

static choir_status write_copies(upcycle *u)
{
    for (uint64_t i = 0; i < choir_gguf_n_tensors(u->gguf); i++) {
        const choir_gguf_tensor *t = choir_gguf_tensor_at(u->gguf, i);
        if (is_mlp(t->name)) continue;
        CHOIR_TRY(gguf_writer_data(&u->w, t->data, t->bytes));
        CHOIR_TRY(gguf_writer_pad(&u->w));
    }
    return CHOIR_OK;
}

static choir_status write_part(upcycle *u, uint32_t l, mlp_part part)
{
    choir_tensor base;
    CHOIR_TRY(choir_model_file_tensor(u->file, part_roles[part], l, 0, &base));
    size_t row_bytes = choir_dtype_row_bytes(u->o->quant, base.cols);
    for (uint32_t e = 0; e <= u->o->n_experts; e++)
        for (uint32_t r = 0; r < base.rows; r++) {
            choir_tensor_row(&base, r, u->row);
            if (e > 0) lora_add_row(&u->adapters[e - 1], l, part, r, base.cols, u->row);
            quantize_row(u->o->quant, u->row, base.cols, u->packed + r % 64 * row_bytes);
            if (r % 64 == 63 || r + 1 == base.rows)
                CHOIR_TRY(gguf_writer_data(&u->w, u->packed, (r % 64 + 1) * row_bytes));
        }
    return gguf_writer_pad(&u->w);
}

static choir_status write_experts(upcycle *u)
{
    size_t gate = (size_t)(u->o->n_experts + 1) * u->c->hidden;
    for (uint32_t l = 0; l < u->c->n_layers; l++) {
        CHOIR_TRY(gguf_writer_data(&u->w, u->gates + l * gate, gate * sizeof *u->gates));
        CHOIR_TRY(gguf_writer_pad(&u->w));
        for (int p = 0; p < MLP_PARTS; p++) CHOIR_TRY(write_part(u, l, p));
    }
    return CHOIR_OK;
}

static choir_status make_buffers(upcycle *u)
{
    uint32_t widest = u->c->hidden > u->c->ffn_hidden ? u->c->hidden : u->c->ffn_hidden;
    u->adapters = choir_calloc(CHOIR_MEM_TUNE, u->o->n_experts, sizeof *u->adapters);
    u->gates = choir_alloc(CHOIR_MEM_TUNE, (size_t)u->c->n_layers * (u->o->n_experts + 1) *
                                               u->c->hidden * sizeof *u->gates);
    u->row = choir_alloc(CHOIR_MEM_TUNE, widest * sizeof *u->row);
    u->packed = choir_alloc(CHOIR_MEM_TUNE, 64 * choir_dtype_row_bytes(u->o->quant, widest));
    if (u->adapters == NULL || u->gates == NULL || u->row == NULL || u->packed == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory to upcycle %s", u->o->base);
    return CHOIR_OK;
}

static choir_status run(upcycle *u)
{
    CHOIR_TRY(check_options(u->o));
    CHOIR_TRY(open_base(u));
    CHOIR_TRY(make_buffers(u));
    for (uint32_t i = 0; i < u->o->n_experts; i++)
        CHOIR_TRY(lora_open(u->o->experts[i].adapter, u->c, &u->adapters[i]));
    CHOIR_TRY(make_gates(u->o, u->c, u->gates));
    CHOIR_TRY(gguf_writer_begin(&u->w, u->o->out, u->o->show_progress));
    CHOIR_TRY(write_metadata(u));
    CHOIR_TRY(declare_tensors(u));
    CHOIR_TRY(gguf_writer_start_data(&u->w));
    CHOIR_TRY(write_copies(u));
    CHOIR_TRY(write_experts(u));
    return gguf_writer_commit(&u->w);
}

choir_status choir_upcycle(const choir_upcycle_options *options)
{
    upcycle u = {.o = options};
    choir_status status = run(&u);
    gguf_writer_end(&u.w);
    for (uint32_t i = 0; u.adapters != NULL && i < options->n_experts; i++) lora_close(&u.adapters[i]);
    choir_free(u.adapters);
    choir_free(u.gates);
    choir_free(u.row);
    choir_free(u.packed);
    choir_model_file_close(u.file);
    return status;
}
