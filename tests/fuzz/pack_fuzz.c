/* A `.choir` file read back: a good pack whose tables an input has edited, its checksums made right
 * again so that what lies behind them is reached. Input: edits of 5 bytes (place, value), then
 * opened as a model, resident and streamed. What remains of five bytes picks the pack: without
 * small copies of the experts, or with some. */
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
static struct {
    uint8_t *data;
    size_t bytes;
} packs[2]; /* without and with small copies */
static uint8_t *edited;
static size_t pack_bytes; /* of the edited one */

static void remove_file(void)
{
    unlink(path);
}

/* Routes of the fixture's 3 layers and 8 experts. */
static void write_routes(const char *to)
{
    FILE *f = fopen(to, "w");
    CHOIR_ASSERT(f != NULL);
    for (int i = 0; i < 3 * 20; i++)
        fprintf(f, "{\"layer\":%d,\"token\":%d,\"experts\":[%d],\"weights\":[1]}\n", i % 3, i,
                i * i % 8);
    CHOIR_ASSERT(fclose(f) == 0);
}

static void make_packs(void)
{
    char *data, routes[80];
    snprintf(path, sizeof path, "/tmp/pack_fuzz-%ld.choir", (long)getpid());
    snprintf(routes, sizeof routes, "%s.jsonl", path);
    for (int small = 0; small < 2; small++) {
        choir_pack_options o = CHOIR_PACK_OPTIONS_DEFAULT;
        o.model = "tests/fixtures/models/mixtral";
        o.out = path;
        o.n_threads = 1;
        if (small) {
            write_routes(routes);
            o.small = CHOIR_Q3;
            o.usage = routes;
        }
        CHOIR_ASSERT(choir_pack_write(&o) == CHOIR_OK);
        CHOIR_ASSERT(choir_file_read(path, 1 << 26, &data, &packs[small].bytes) == CHOIR_OK);
        packs[small].data = (uint8_t *)data;
    }
    unlink(routes);
    edited = malloc(packs[0].bytes + packs[1].bytes);
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

static void try_model(uint64_t expert_bytes, double small_experts)
{
    choir_engine_options o = CHOIR_ENGINE_OPTIONS_DEFAULT;
    choir_engine *engine = NULL;
    o.n_threads = 1;
    o.max_rows = o.max_spans = 4;
    o.expert_bytes = expert_bytes;
    o.small_experts = small_experts;
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
    if (edited == NULL) make_packs();
    bool small = bytes % 5 != 0;
    pack_bytes = packs[small].bytes;
    memcpy(edited, packs[small].data, pack_bytes);
    choir_pack_header h;
    memcpy(&h, edited, sizeof h);
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
    try_model(0, small ? 0.5 : 0);
    try_model(1 << 20, small ? 0.5 : 0);
    if (small) try_model(0, 0);
    return 0;
}
