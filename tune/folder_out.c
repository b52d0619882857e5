#include "tune/folder_out.h"

#include "tune/hf_files.h"
#include "tune/out_folder.h"

#include <stdio.h>
#include <string.h>

enum { MAX_PATH_BYTES = 4096 };

/* Tensors [begin, end) of the plan lie in one file. */
typedef struct shard {
    char name[64];
    size_t begin, end;
} shard;

typedef struct output {
    const choir_tune_moe *moe;
    const choir_tune_folder *folder;
    choir_tune_out_folder place;
    choir_tune_plan plan;
    shard *shards;
    size_t n_shards;
    choir_tune_writer writer;
} output;

static const char *type_name(choir_dtype dtype)
{
    return choir_dtype_text(dtype); /* "F32", "F16", "BF16": safetensors has the same words */
}

/* As many tensors to a file as fit, at least one. */
static choir_status cut_shards(output *o)
{
    o->shards = choir_calloc(CHOIR_MEM_TUNE, o->plan.n, sizeof *o->shards);
    if (o->shards == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a list of files");
    for (size_t i = 0; i < o->plan.n; o->n_shards++) {
        shard *s = &o->shards[o->n_shards];
        uint64_t bytes = 0;
        s->begin = i;
        do bytes += o->plan.items[i++].bytes;
        while (i < o->plan.n && bytes + o->plan.items[i].bytes <= o->folder->shard_bytes);
        s->end = i;
    }
    for (size_t k = 0; k < o->n_shards; k++) {
        if (o->n_shards == 1)
            snprintf(o->shards[k].name, sizeof o->shards[k].name, "model.safetensors");
        else
            snprintf(o->shards[k].name, sizeof o->shards[k].name,
                     "model-%05zu-of-%05zu.safetensors", k + 1, o->n_shards);
    }
    return CHOIR_OK;
}

static json_t *header_of(const output *o, const shard *s)
{
    json_t *header = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    json_int_t at = 0;
    for (size_t i = s->begin; i < s->end; i++) {
        const choir_tune_tensor *t = &o->plan.items[i];
        json_t *shape = t->vector ? json_pack("[i]", (int)t->cols)
                                  : json_pack("[i, i]", (int)t->rows, (int)t->cols);
        json_int_t end = at + (json_int_t)t->bytes;
        choir_tune_json_set(&header, t->name,
                            json_pack("{s:s, s:o, s:[I, I]}", "dtype", type_name(t->dtype), "shape",
                                      shape, "data_offsets", at, end));
        at = end;
    }
    return header;
}

static choir_status write_shard(output *o, const shard *s, choir_save *save)
{
    uint64_t bytes;
    CHOIR_TRY(choir_tune_save_header(save, s->name, header_of(o, s), &bytes));
    choir_status status = CHOIR_OK;
    for (size_t i = s->begin; i < s->end && status == CHOIR_OK; i++)
        status = choir_tune_write(&o->writer, &o->plan.items[i], save);
    return status;
}

static choir_status save_shard(output *o, const shard *s)
{
    char path[MAX_PATH_BYTES + 80];
    choir_save save;
    snprintf(path, sizeof path, "%s/%s", o->place.temporary, s->name);
    CHOIR_TRY(choir_save_begin(path, &save));
    choir_status status = write_shard(o, s, &save);
    if (status == CHOIR_OK) return choir_save_commit(&save);
    choir_save_abandon(&save);
    return status;
}

static choir_status save_index(const output *o)
{
    json_t *map = json_object();
    for (size_t k = 0; k < o->n_shards; k++)
        for (size_t i = o->shards[k].begin; i < o->shards[k].end; i++)
            choir_tune_json_set(&map, o->plan.items[i].name, json_string(o->shards[k].name));
    return choir_tune_save_json(o->place.temporary, "model.safetensors.index.json",
                                json_pack("{s:{s:I}, s:o}", "metadata", "total_size",
                                          (json_int_t)o->plan.bytes, "weight_map", map));
}

static choir_status save_weights(output *o)
{
    char what[128];
    const char *slash = strrchr(o->folder->path, '/');
    snprintf(what, sizeof what, "writing %.100s",
             slash == NULL || slash[1] == '\0' ? o->folder->path : slash + 1);
    CHOIR_TRY(choir_tune_writer_create(o->moe, &o->plan, o->folder->n_threads, &o->writer));
    choir_progress_begin(&o->writer.progress, what, CHOIR_PROGRESS_BYTES, o->plan.bytes);
    o->writer.progress.quiet = !o->folder->show_progress;
    choir_status status = CHOIR_OK;
    for (size_t k = 0; k < o->n_shards && status == CHOIR_OK; k++)
        status = save_shard(o, &o->shards[k]);
    choir_progress_end(&o->writer.progress);
    choir_tune_writer_destroy(&o->writer);
    if (status == CHOIR_OK && o->n_shards > 1) status = save_index(o);
    return status;
}

static choir_status write_folder(output *o)
{
    CHOIR_TRY(choir_tune_plan_make(o->moe, o->folder->dtype, false, &o->plan));
    CHOIR_TRY(cut_shards(o));
    CHOIR_TRY(choir_tune_check_space(o->folder->path, o->plan.bytes));
    CHOIR_TRY(choir_tune_out_folder_begin(o->folder->path, &o->place));
    choir_status status = choir_tune_save_hf_files(o->moe, o->folder->dtype, o->place.temporary);
    if (status == CHOIR_OK) status = save_weights(o);
    if (status == CHOIR_OK) status = choir_tune_out_folder_commit(&o->place);
    if (status != CHOIR_OK) choir_tune_out_folder_abandon(&o->place);
    return status;
}

choir_status choir_tune_write_folder(const choir_tune_moe *moe, const choir_tune_folder *folder)
{
    if (choir_model_file_gguf(moe->base) != NULL &&
        choir_role_in_layer(moe->config, CHOIR_ROLE_ROPE_FACTORS, 0))
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "%s has rope factors in a tensor, which config.json cannot say; name a .gguf "
            "file as the output",
            choir_model_file_path(moe->base));
    output o = {.moe = moe, .folder = folder};
    choir_status status = write_folder(&o);
    choir_free(o.shards);
    choir_tune_plan_free(&o.plan);
    return status;
}
