/* A `.choir` file read back: a good pack whose tables an input has edited, its checksums made right
 * again so that what lies behind them is reached. Input: edits of 5 bytes (place, value), then
 * opened as a model, resident and streamed. */
#include "engine/engine.h"
#include "engine/pack_file.h"
#include "tune/tune.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <xxhash.h>

static char path[64];
static uint8_t *pack, *edited;
static size_t pack_bytes;

static void remove_file(void)
{
    unlink(path);
}

static void make_pack(void)
{
    char *data;
    snprintf(path, sizeof path, "/tmp/pack_fuzz-%ld.choir", (long)getpid());
    const choir_pack_options o = {.model = "tests/fixtures/models/mixtral",
                                  .out = path,
                                  .quant = CHOIR_N_DTYPES,
                                  .n_threads = 1};
    CHOIR_ASSERT(choir_pack_write(&o) == CHOIR_OK);
    CHOIR_ASSERT(choir_file_read(path, 1 << 26, &data, &pack_bytes) == CHOIR_OK);
    pack = (uint8_t *)data;
    edited = malloc(pack_bytes);
    CHOIR_ASSERT(edited != NULL);
    atexit(remove_file);
}

static void seal(void)
{
    choir_pack_header h;
    memcpy(&h, edited, sizeof h);
    if (h.tables_bytes <= pack_bytes - CHOIR_PACK_PAGE)
        h.tables_hash = XXH3_64bits(edited + CHOIR_PACK_PAGE, h.tables_bytes);
    memcpy(edited, &h, sizeof h);
    uint64_t hash = XXH3_64bits(edited, CHOIR_PACK_HASH_AT);
    memcpy(edited + CHOIR_PACK_HASH_AT, &hash, sizeof hash);
}

static void try_model(uint64_t expert_bytes)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    choir_engine *engine = NULL;
    o.n_threads = 1;
    o.max_rows = o.max_spans = 4;
    o.expert_bytes = expert_bytes;
    o.io = CHOIR_IO_PREAD;
    if (choir_engine_open(path, &o, &engine) != CHOIR_OK) return;
    uint32_t token = 1, page = 0;
    choir_span span = {
        .tokens = &token, .n_tokens = 1, .pages = &page, .n_pages = 1, .n_logits = 1};
    CHOIR_ASSERT(choir_engine_step(engine, &span, 1) == CHOIR_OK);
    choir_engine_close(engine);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (pack == NULL) make_pack();
    memcpy(edited, pack, pack_bytes);
    choir_pack_header h;
    memcpy(&h, pack, sizeof h);
    for (size_t i = 0; i + 5 <= bytes && i < 200; i += 5) {
        uint32_t at;
        memcpy(&at, data + i, 4);
        /* The header's fields, the tables; seldom the rest. */
        size_t places = at % 16 == 0 ? pack_bytes : sizeof h + h.tables_bytes;
        size_t place = (at / 16) % places;
        if (at % 16 != 0 && place >= sizeof h) place += CHOIR_PACK_PAGE - sizeof h;
        edited[place] = data[i + 4];
    }
    seal();
    int fd = open(path, O_WRONLY | O_TRUNC);
    CHOIR_ASSERT(fd >= 0 && write(fd, edited, pack_bytes) == (ssize_t)pack_bytes);
    close(fd);
    try_model(0);
    try_model(1 << 20);
    return 0;
}
