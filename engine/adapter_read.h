/* WHAT    What the readers of adapters share: the file's tensors, the places that names mean, and
 *         the changes as they are collected. Internal to engine/.
 * OWNS    A reader: all but the arena, which its data takes over.
 * THREADS One.
 * ERRORS  As engine/adapter_file.h says; every sentence begins with the reader's name.
 * LIMITS  A tensor is used once: what is left unused at the end is refused by name.
 * NEXT    adapter_file.c collects, adapter_place.c names, adapter_peft.c and adapter_gguf.c read */
#pragma once
#include "base/base.h"
#include "engine/adapter_file.h"
#include "engine/adapter_pairs.h"
#include "engine/families/families.h"
#include "engine/gguf.h"

typedef struct choir_adapter_tensor {
    const char *name, *type; /* type: as the file writes it */
    bool readable, used;
    choir_dtype dtype;
    uint32_t n_dims;
    uint64_t dims[8]; /* slowest first */
    const void *data; /* NULL where only headers are read */
    size_t bytes;
} choir_adapter_tensor;

/* What a name of the base means: a matrix, or a part of the rows of one. */
typedef struct choir_adapter_place {
    char *pattern; /* "model.layers.%l.mlp.experts.%e.up_proj.weight" */
    choir_role role;
    choir_part part;
    bool transposed, stacked; /* stacked: all experts in one tensor */
    uint32_t order;           /* of being added: the first that says something of a role counts */
} choir_adapter_place;

enum { CHOIR_ADAPTER_MAX_PARTS = 4 };
typedef struct choir_adapter_spot {
    const choir_adapter_place *places[CHOIR_ADAPTER_MAX_PARTS];
    uint32_t n_places; /* 0: the base has no such name */
    uint32_t layer, index;
} choir_adapter_spot;

/* A change, and the tensor that it came of. */
typedef struct choir_adapter_piece {
    choir_adapter_change change;
    const char *tensor;
} choir_adapter_piece;

typedef struct choir_adapter_reader {
    const choir_model_config *base;
    const char *name;
    bool headers_only, lends;
    const json_t *config; /* NULL: a GGUF file */
    const choir_gguf *gguf;
    choir_adapter_tensor *tensors; /* by name */
    size_t n_tensors;
    choir_adapter_place *places; /* by pattern */
    size_t n_places, places_capacity;
    choir_adapter_piece *pieces;
    size_t n_pieces, pieces_capacity;
    choir_arena *arena;
    float *scratch; /* of choir_adapter_load() */
    size_t scratch_n;
    choir_adapter_data *data;
    choir_adapter_pairs *pairs; /* NULL, or where LoRA's pairs are listed as they lie */
    size_t pairs_capacity;
} choir_adapter_reader;

/* adapter_place.c: the names of the base's modules, those of its file and those that transformers
 * gives them. */
choir_status choir_adapter_make_places(choir_adapter_reader *reader, bool gguf) CHOIR_MUST_USE;
void choir_adapter_free_places(choir_adapter_reader *reader);
/* `name` as in the base: "model.layers.3.self_attn.q_proj.weight". */
choir_adapter_spot choir_adapter_find_spot(const choir_adapter_reader *reader, const char *name);
/* The stacked parameters of a module, in the order in which transformers has them: "…mlp.experts"
 * has gate_up_proj and down_proj. Names are given in `out`; the number of them. */
enum { CHOIR_ADAPTER_MAX_NAME = 256, CHOIR_ADAPTER_MAX_STACKED = 4 };
uint32_t choir_adapter_stacked(const choir_adapter_reader *reader, const char *module,
                               char out[CHOIR_ADAPTER_MAX_STACKED][CHOIR_ADAPTER_MAX_NAME]);
/* Whether the base has what the spot says; a sentence about `tensor` if it does not. */
choir_status choir_adapter_check_spot(const choir_adapter_reader *reader,
                                      const choir_adapter_spot *spot,
                                      const char *tensor) CHOIR_MUST_USE;
/* Rows and columns of the file's whole matrix (of one expert), of which the place is a part. */
void choir_adapter_whole_shape(const choir_adapter_reader *reader, const choir_adapter_place *place,
                               uint64_t *rows, uint64_t *cols);
bool choir_adapter_is_vector(choir_role role);
/* The matrix that a role of biases belongs to; CHOIR_N_ROLES: it is none of those. */
choir_role choir_adapter_role_of_bias(choir_role role);

/* Which row of the file's whole matrix is row i of the base's. */
typedef struct choir_adapter_rows {
    choir_part part;
    uint32_t n, whole, queries, keys;
    uint32_t head_dim;
    enum { CHOIR_ROWS_AS_THEY_ARE, CHOIR_ROWS_OF_HALVES, CHOIR_ROWS_OF_PAIRS } order;
} choir_adapter_rows;
choir_adapter_rows choir_adapter_rows_of(const choir_adapter_reader *reader,
                                         const choir_adapter_place *place);
uint32_t choir_adapter_row(const choir_adapter_rows *rows, uint32_t i);
bool choir_adapter_rows_move(
    const choir_adapter_rows *rows); /* false: row i is row i of the whole */

/* adapter_file.c */
choir_adapter_tensor *choir_adapter_find(const choir_adapter_reader *reader, const char *name);
/* Memory that lives as long as the data. */
choir_status choir_adapter_floats(choir_adapter_reader *reader, size_t n,
                                  float **out) CHOIR_MUST_USE;
/* Refuses a tensor that is not [rows, cols]; rows 0: a vector of cols. */
choir_status choir_adapter_expect(const choir_adapter_reader *reader, const choir_adapter_tensor *t,
                                  uint64_t rows, uint64_t cols) CHOIR_MUST_USE;
/* The same of [n, rows, cols]. */
choir_status choir_adapter_expect_stack(const choir_adapter_reader *reader,
                                        const choir_adapter_tensor *t, uint64_t n, uint64_t rows,
                                        uint64_t cols) CHOIR_MUST_USE;
/* A tensor as f32, every number finite, in the arena; marks it as used. With `rows`, its rows as
 * the base has them. NULL where only headers are read. */
choir_status choir_adapter_read(choir_adapter_reader *reader, choir_adapter_tensor *t,
                                const choir_adapter_rows *rows, const float **out) CHOIR_MUST_USE;
/* The tensor where it lies, if numbers may stay there and lie as the base has them: its data is NULL if not. Marks it
 * as used, every number finite. */
choir_status choir_adapter_lend(choir_adapter_reader *reader, choir_adapter_tensor *t,
                                const choir_adapter_rows *rows, choir_tensor *out) CHOIR_MUST_USE;
/* The whole tensor as f32 in scratch memory, until the next call; not where only headers are read.
 */
choir_status choir_adapter_load(choir_adapter_reader *reader, choir_adapter_tensor *t,
                                const float **out) CHOIR_MUST_USE;
/* A change of a place, its shape filled in. */
choir_adapter_change choir_adapter_begin(const choir_adapter_reader *reader,
                                         const choir_adapter_place *place, uint32_t layer,
                                         uint32_t index);
/* What it says is joined with what others say of the same matrix. */
choir_status choir_adapter_add(choir_adapter_reader *reader, const choir_adapter_change *change,
                               const char *tensor) CHOIR_MUST_USE;
choir_status choir_adapter_refuse(const choir_adapter_reader *reader,
                                  const char *tensor) CHOIR_MUST_USE;

/* Head by head of one matrix: kv_b_proj of latent attention. */
static inline bool choir_adapter_is_of_heads(const choir_adapter_place *place)
{
    return place->part == CHOIR_PART_HEAD_K || place->part == CHOIR_PART_HEAD_V;
}

/* adapter_pair.c. The tensors are marked as used; what is not there is NULL. */
typedef struct choir_adapter_pair {
    choir_adapter_tensor *a, *a_bias, *b, *b_bias, *magnitude;
    uint32_t rank;
    float scale;
    choir_adapter_act act;
    bool series, residual;
    bool swapped; /* of stacked experts: A is beside the outputs, where the shapes leave it open */
} choir_adapter_pair;
choir_status choir_adapter_add_pair(choir_adapter_reader *reader, const choir_adapter_spot *spot,
                                    const choir_adapter_pair *pair) CHOIR_MUST_USE;
choir_status choir_adapter_add_embedding(choir_adapter_reader *reader,
                                         const choir_adapter_spot *spot,
                                         const choir_adapter_pair *pair) CHOIR_MUST_USE;
choir_status choir_adapter_add_stack(choir_adapter_reader *reader, const choir_adapter_spot *spot,
                                     const choir_adapter_pair *pair) CHOIR_MUST_USE;

/* Of a configuration's object; a value that is null is absent. */
const json_t *choir_adapter_get(const choir_adapter_reader *reader, const char *key);
bool choir_adapter_is_off(const json_t *value); /* absent, null, false, 0, "", [], {} */
const char *choir_adapter_string(const choir_adapter_reader *reader, const char *key,
                                 const char *otherwise);
choir_status choir_adapter_flag(const choir_adapter_reader *reader, const char *key,
                                bool *out) CHOIR_MUST_USE;
/* Refuses each of the keys that is set: a NULL ends the list. */
choir_status choir_adapter_refuse_keys(const choir_adapter_reader *reader,
                                       const char *const *keys) CHOIR_MUST_USE;
/* Whether a name of a list is the module's, or ends it behind a dot, as PEFT compares them. */
bool choir_adapter_is_listed(const json_t *list, const char *module);

/* The kinds; each in a file of its name. */
choir_status choir_adapter_read_peft(choir_adapter_reader *reader) CHOIR_MUST_USE;
choir_status choir_adapter_read_lora(choir_adapter_reader *reader) CHOIR_MUST_USE;
choir_status choir_adapter_read_ia3(choir_adapter_reader *reader) CHOIR_MUST_USE;
choir_status choir_adapter_read_vera(choir_adapter_reader *reader) CHOIR_MUST_USE;
choir_status choir_adapter_read_prompt(choir_adapter_reader *reader) CHOIR_MUST_USE;
choir_status choir_adapter_read_prefix(choir_adapter_reader *reader) CHOIR_MUST_USE;
choir_status choir_adapter_read_bottleneck(choir_adapter_reader *reader) CHOIR_MUST_USE;
choir_status choir_adapter_read_hub(choir_adapter_reader *reader) CHOIR_MUST_USE;
choir_status choir_adapter_read_gguf(choir_adapter_reader *reader) CHOIR_MUST_USE;
/* adapter_saved.c: whole matrices, norms and biases beside an adapter: modules_to_save, bias,
 * embeddings. */
choir_status choir_adapter_read_saved(choir_adapter_reader *reader) CHOIR_MUST_USE;
/* A tensor that takes the place of the base's own; `more`: further bits of `has`. */
choir_status choir_adapter_add_whole(choir_adapter_reader *reader, const choir_adapter_spot *spot,
                                     choir_adapter_tensor *t, uint32_t more) CHOIR_MUST_USE;
/* "base_model.model.X" without its prefix and without the name of the text model of one that also
 * sees; false: it has no such prefix. */
bool choir_adapter_plain_name(const char *tensor, char *out, size_t bytes);
/* A plain name as the model that the adapter was made for has it: what PEFT compares with the names
 * and expressions of a configuration. `tensor`: of that model, in whose plain name `plain` begins
 * or whose plain name begins so. Returns `out`. */
enum { CHOIR_ADAPTER_MAX_OWN_NAME = CHOIR_ADAPTER_MAX_NAME + 32 };
const char *choir_adapter_own_name(const char *tensor, const char *plain,
                                   char out[CHOIR_ADAPTER_MAX_OWN_NAME]);
/* The spot of a module that has a matrix, without the suffix that the method adds: a sentence if it
 * has none. */
choir_status choir_adapter_module_spot(const choir_adapter_reader *reader, const char *tensor,
                                       const char *suffix, char *module, size_t bytes,
                                       choir_adapter_spot *out) CHOIR_MUST_USE;
/* The tensor of the same module with another suffix; NULL: there is none. */
choir_adapter_tensor *choir_adapter_beside(const choir_adapter_reader *reader, const char *tensor,
                                           const char *suffix, const char *other);
choir_status choir_adapter_number(const choir_adapter_reader *reader, const char *key,
                                  double *out) CHOIR_MUST_USE;
/* A rank as a file says it, of 1 to CHOIR_ADAPTER_MAX_RANK. */
choir_status choir_adapter_check_rank(const choir_adapter_reader *reader, double rank,
                                      const char *field, const char *of) CHOIR_MUST_USE;
bool choir_adapter_ends_with(const char *name, const char *suffix);
/* Takes `suffix` off the end of `name`; false: it does not end so. */
bool choir_adapter_strip(char *name, const char *suffix);

/* adapter_file.c: headers alone are read, with the pairs' places in the file; those live as long as the data. */
choir_status choir_adapter_list_pairs(const choir_model_config *base,
                                      const choir_adapter_source *source,
                                      choir_adapter_pairs *pairs,
                                      choir_adapter_data **out) CHOIR_MUST_USE;
/* adapter_pairs.c: one more pair, which has been checked, where they are listed. */
choir_status choir_adapter_note_pair(choir_adapter_reader *reader, const choir_adapter_spot *spot,
                                     const choir_adapter_pair *pair) CHOIR_MUST_USE;
