#include "tune/gguf_writer.h"

#include <string.h>

enum { ALIGNMENT = 32, GGUF_U32 = 4, GGUF_TEXT = 8 };

static choir_status append(uint8_t **buffer, size_t *bytes, size_t *room, const void *data, size_t n)
{
    if (*bytes + n > *room) {
        size_t larger = (*bytes + n) * 2;
        uint8_t *p = choir_realloc(CHOIR_MEM_TUNE, *buffer, larger);
        if (p == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a GGUF header");
        *buffer = p;
        *room = larger;
    }
    memcpy(*buffer + *bytes, data, n);
    *bytes += n;
    return CHOIR_OK;
}

static choir_status head(gguf_writer *w, const void *data, size_t n)
{
    return append(&w->head, &w->head_bytes, &w->head_room, data, n);
}

static choir_status table(gguf_writer *w, const void *data, size_t n)
{
    return append(&w->table, &w->table_bytes, &w->table_room, data, n);
}

choir_status gguf_writer_begin(gguf_writer *w, const char *path, bool show_progress)
{
    *w = (gguf_writer){.show = show_progress};
    CHOIR_TRY(choir_save_begin(path, &w->save));
    w->open = true;
    return CHOIR_OK;
}

choir_status gguf_writer_raw(gguf_writer *w, const void *entry, size_t bytes)
{
    w->n_entries++;
    return head(w, entry, bytes);
}

static choir_status write_key(gguf_writer *w, const char *key, uint32_t type)
{
    uint64_t n = strlen(key);
    CHOIR_TRY(head(w, &n, 8));
    CHOIR_TRY(head(w, key, n));
    w->n_entries++;
    return head(w, &type, 4);
}

choir_status gguf_writer_u32(gguf_writer *w, const char *key, uint32_t value)
{
    CHOIR_TRY(write_key(w, key, GGUF_U32));
    return head(w, &value, 4);
}

choir_status gguf_writer_text(gguf_writer *w, const char *key, const char *value)
{
    uint64_t n = strlen(value);
    CHOIR_TRY(write_key(w, key, GGUF_TEXT));
    CHOIR_TRY(head(w, &n, 8));
    return head(w, value, n);
}

choir_status gguf_writer_tensor(gguf_writer *w, const char *name, choir_dtype dtype, uint32_t n_dims,
                                const uint64_t *dims)
{
    uint64_t n = strlen(name), elements = 1;
    uint32_t type = choir_dtype_gguf(dtype);
    for (uint32_t d = 0; d < n_dims; d++) elements *= dims[d];
    CHOIR_TRY(table(w, &n, 8));
    CHOIR_TRY(table(w, name, n));
    CHOIR_TRY(table(w, &n_dims, 4));
    CHOIR_TRY(table(w, dims, n_dims * sizeof *dims));
    CHOIR_TRY(table(w, &type, 4));
    CHOIR_TRY(table(w, &w->data_bytes, 8));
    w->n_tensors++;
    w->data_bytes += (choir_dtype_row_bytes(dtype, elements) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return CHOIR_OK;
}

choir_status gguf_writer_start_data(gguf_writer *w)
{
    static const char zeros[ALIGNMENT];
    const uint32_t start[2] = {0x46554747, 3};
    const uint64_t counts[2] = {w->n_tensors, w->n_entries};
    CHOIR_TRY(choir_save_write(&w->save, start, sizeof start));
    CHOIR_TRY(choir_save_write(&w->save, counts, sizeof counts));
    CHOIR_TRY(choir_save_write(&w->save, w->head, w->head_bytes));
    CHOIR_TRY(choir_save_write(&w->save, w->table, w->table_bytes));
    size_t at = sizeof start + sizeof counts + w->head_bytes + w->table_bytes;
    if (w->show)
        choir_progress_begin(&w->progress, "writing", CHOIR_PROGRESS_BYTES, w->data_bytes);
    return choir_save_write(&w->save, zeros, (ALIGNMENT - at % ALIGNMENT) % ALIGNMENT);
}

choir_status gguf_writer_data(gguf_writer *w, const void *data, size_t bytes)
{
    CHOIR_TRY(choir_save_write(&w->save, data, bytes));
    w->written += bytes;
    if (w->show) choir_progress_update(&w->progress, w->written);
    return CHOIR_OK;
}

choir_status gguf_writer_pad(gguf_writer *w)
{
    static const char zeros[ALIGNMENT];
    return gguf_writer_data(w, zeros, (ALIGNMENT - w->written % ALIGNMENT) % ALIGNMENT);
}

choir_status gguf_writer_commit(gguf_writer *w)
{
    CHOIR_ASSERT(w->written == w->data_bytes);
    if (w->show) choir_progress_end(&w->progress);
    w->open = false; /* commit removes the temporary file itself when it fails */
    return choir_save_commit(&w->save);
}

void gguf_writer_end(gguf_writer *w)
{
    if (w->open) choir_save_abandon(&w->save);
    choir_free(w->head);
    choir_free(w->table);
    *w = (gguf_writer){0};
}
