/* WHAT    The `.choir` file: a model packed for streaming. Its tables, texts and vectors are read at once;
 *         matrices and experts lie in the kernels' layout, to be read when wanted. docs/formats.md has
 *         every byte.
 * OWNS    Its tables; texts and vectors are views into them until close. No file stays open.
 * THREADS Read-only after open.
 * ERRORS  CHOIR_E_FORMAT names the file, the field and its value; CHOIR_E_DATA_LOSS: a checksum is wrong.
 * LIMITS  Every count, size and offset is checked against the file and against what the model's
 *         configuration wants: a pack cannot say how its bytes are to be read.
 * NEXT    engine/model_file.h; tune/pack_out.c, which writes it */
#pragma once
#include "engine/model_file.h"
#include "engine/texts.h"
#include "experts/experts.h"

/* -- the bytes, little-endian -- */

#define CHOIR_PACK_MAGIC "\x89" "CHOIRP\n"
#define CHOIR_PACK_UNFINISHED "\x89" "CHOIRT\n" /* of a file that is still being written */
enum {
    CHOIR_PACK_VERSION = 1,
    CHOIR_PACK_VERSION_SMALL = 2, /* with a table of small copies behind the runs */
    CHOIR_PACK_PAGE = CHOIR_DISK_PAGE,
    CHOIR_PACK_FROM_GGUF = 1, /* flags: the text "gguf" describes the model; else config.json does */
    CHOIR_PACK_HAS_USAGE = 2, /* version 2: the small copies' table says how often experts are used */
};

typedef struct choir_pack_header {
    char magic[8];
    uint32_t version, page_bytes, flags;
    uint32_t n_tensors, n_runs, n_texts;
    uint64_t file_bytes;
    uint64_t tables_bytes; /* from CHOIR_PACK_PAGE on: tensors, runs, texts, their bytes */
    uint64_t tables_hash;  /* XXH3 of those, and the model's digest */
    uint64_t vectors_offset, vectors_bytes;
    uint64_t n_parameters;
    uint64_t source, n_done; /* while it is being written: of what, and units that are whole */
    char name[128], kind[16], types[256]; /* for people; NUL-terminated */
} choir_pack_header;

typedef struct choir_pack_tensor {
    uint16_t role;  /* CHOIR_ROLE_… by its place in the list of version 1 */
    uint8_t layout; /* CHOIR_LAYOUT_…; EXACT: a vector or gate as f32 */
    uint8_t dtype;  /* of the source */
    uint32_t layer, index, rows, cols, flags;
    uint64_t offset, bytes;
    uint64_t checksum; /* XXH3 */
    uint64_t reserved[2];
} choir_pack_tensor;

/* Gate, up and down of an expert, each at a multiple of 64 bytes; the run at a multiple of the page. */
typedef struct choir_pack_run {
    uint32_t layer, expert;
    uint64_t offset, bytes; /* without what fills its last page */
    uint64_t reserved[2];
} choir_pack_run;

/* An expert's smaller copy, a run as well: the i-th is that of the i-th run. */
typedef struct choir_pack_small {
    uint64_t offset, bytes;
    float usage; /* the share of a text's tokens that the expert took, 0 … 1; 0 without the flag */
    uint8_t dtypes[3], layouts[3]; /* of gate, up and down, here as below */
    uint8_t reserved[2];
    uint32_t flags[3];
    uint64_t checksums[3]; /* XXH3 */
} choir_pack_small;

typedef struct choir_pack_text_entry {
    char name[48];
    uint64_t offset, bytes; /* in the tables */
} choir_pack_text_entry;

_Static_assert(sizeof(choir_pack_header) == 496 && sizeof(choir_pack_tensor) == 64 &&
                   sizeof(choir_pack_run) == 40 && sizeof(choir_pack_text_entry) == 64 &&
                   sizeof(choir_pack_small) == 64,
               "the file's structs have no holes");
/* The header's page ends with its XXH3. */
enum { CHOIR_PACK_HASH_AT = CHOIR_PACK_PAGE - 8 };

/* -- reading -- */

bool choir_pack_is(const char *path); /* a regular file with the magic of a whole or unfinished pack */
choir_status choir_pack_open(const char *path, choir_pack **out) CHOIR_MUST_USE;
/* From memory, for fuzzing: what open reads. */
choir_status choir_pack_parse(const char *name, const void *data, size_t bytes, choir_pack **out)
    CHOIR_MUST_USE;
void choir_pack_close(choir_pack *pack);

const choir_pack_header *choir_pack_get_header(const choir_pack *pack);
bool choir_pack_text(const choir_pack *pack, const char *name, const char **data, size_t *bytes);
const choir_pack_tensor *choir_pack_find(const choir_pack *pack, choir_role role, uint32_t layer,
                                         uint32_t index); /* NULL: it has none */
/* Against the configuration: every tensor that the model needs is there, with its shape and in the layout
 * that this program would give it, and nothing else. */
choir_status choir_pack_check(const choir_pack *pack, const choir_model_config *config) CHOIR_MUST_USE;
/* A vector's or gate's numbers. */
const float *choir_pack_vector(const choir_pack *pack, const choir_pack_tensor *tensor);
/* data is NULL. */
choir_matrix choir_pack_matrix(const choir_pack_tensor *tensor);
const choir_pack_run *choir_pack_find_run(const choir_pack *pack, uint32_t layer, uint32_t expert);

bool choir_pack_has_small(const choir_pack *pack);
bool choir_pack_has_usage(const choir_pack *pack);
/* Gate, up and down of an expert's small copy, in the form of tensors; the file has them, and the expert. */
const choir_pack_tensor *choir_pack_find_small(const choir_pack *pack, uint32_t layer, uint32_t expert);
float choir_pack_usage(const choir_pack *pack, uint32_t layer, uint32_t expert);
