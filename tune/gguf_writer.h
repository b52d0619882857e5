/* Writes a GGUF v3 file, streaming: metadata and tensor table first, then the tensors' bytes in the order
 * they were declared; internal to tune/. */
#pragma once
#include "engine/engine.h"

typedef struct gguf_writer {
    choir_save save;
    bool open;
    uint8_t *head; /* metadata, then the table */
    size_t head_bytes, head_room;
    uint64_t n_entries, n_tensors, data_bytes, written; /* written: of the data, padding included */
    uint8_t *table;
    size_t table_bytes, table_room;
    choir_progress progress;
    bool show;
} gguf_writer;

choir_status gguf_writer_begin(gguf_writer *w, const char *path, bool show_progress) CHOIR_MUST_USE;
/* A raw entry (key, type, value) as a file holds it, or one made here. */
choir_status gguf_writer_raw(gguf_writer *w, const void *entry, size_t bytes) CHOIR_MUST_USE;
choir_status gguf_writer_u32(gguf_writer *w, const char *key, uint32_t value) CHOIR_MUST_USE;
choir_status gguf_writer_text(gguf_writer *w, const char *key, const char *value) CHOIR_MUST_USE;
/* Declares a tensor; dims fastest first. */
choir_status gguf_writer_tensor(gguf_writer *w, const char *name, choir_dtype dtype, uint32_t n_dims,
                                const uint64_t *dims) CHOIR_MUST_USE;
choir_status gguf_writer_start_data(gguf_writer *w) CHOIR_MUST_USE;
choir_status gguf_writer_data(gguf_writer *w, const void *data, size_t bytes) CHOIR_MUST_USE;
choir_status gguf_writer_pad(gguf_writer *w) CHOIR_MUST_USE; /* after each tensor */
choir_status gguf_writer_commit(gguf_writer *w) CHOIR_MUST_USE;
void gguf_writer_end(gguf_writer *w); /* removes what was not committed */
