/* WHAT    An adapter as a step applies it: low-rank pairs, scales and replaced matrices in the kernels' layout, found
 *         by (layer, role, expert). Never added into the base's weights: y = W x + B (A x), each row its own.
 * OWNS    choir_adapter: its arrays.
 * THREADS Make and free: any thread, beside steps. Read-only in between.
 * ERRORS  CHOIR_E_INVALID, CHOIR_E_UNIMPLEMENTED (what this engine cannot apply, by tensor), CHOIR_E_NO_MEMORY.
 * LIMITS  An adapter that a span names must outlive the step. Rows without adapters cost nothing.
 * NEXT    engine/adapt.c, where steps apply them; experts/adapters.h, the pool of many */
#pragma once
#include "engine/adapter_file.h"

typedef struct choir_engine choir_engine;
typedef struct choir_adapter choir_adapter;

/* X(name, text): how A and B lie in memory. */
#define CHOIR_ADAPTER_TYPE_LIST(X)                                                                 \
    X(AUTO, "auto") /* f16; f32 in exact mode */                                                   \
    X(F32, "f32")                                                                                  \
    X(F16, "f16")   /* f16 and int8 with a scale for each row of A and each column of B */         \
    X(BF16, "bf16")                                                                                \
    X(INT8, "int8")
typedef enum choir_adapter_type {
#define X(name, text) CHOIR_ADAPTER_##name,
    CHOIR_ADAPTER_TYPE_LIST(X)
#undef X
    CHOIR_N_ADAPTER_TYPES
} choir_adapter_type;
const char *choir_adapter_type_text(choir_adapter_type type);
bool choir_adapter_type_parse(const char *text, choir_adapter_type *out);
/* What AUTO is for this engine; the others as they are. */
choir_adapter_type choir_adapter_type_of(const choir_engine *engine, choir_adapter_type type);

/* pages: NULL, or whose memory the adapter takes, and gives back as it is freed. */
choir_status choir_adapter_make(const choir_engine *engine, const choir_adapter_data *data,
                                choir_adapter_type type, choir_page_cache *pages,
                                choir_adapter **out) CHOIR_MUST_USE;
void choir_adapter_free(choir_adapter *adapter);
/* What make() would take, before there is any. */
uint64_t choir_adapter_plan_bytes(const choir_engine *engine, const choir_adapter_data *data,
                                  choir_adapter_type type);
uint64_t choir_adapter_bytes(const choir_adapter *adapter);
uint64_t choir_adapter_digest(const choir_adapter *adapter); /* the data's */
uint32_t choir_adapter_n_virtual(const choir_adapter *adapter);
uint32_t choir_adapter_max_rank(const choir_adapter *adapter);
/* False: it replaces matrices or norms, scales what a matrix is given, or has virtual tokens, and can only be a
 * span's sole adapter, weight 1. */
bool choir_adapter_mixes(const choir_adapter *adapter);
bool choir_adapter_data_mixes(const choir_adapter_data *data); /* the same, of headers too */

enum { CHOIR_MAX_MIX = 8 };
/* One of the adapters that a span's rows have; its changes count so much: y = y0 + Σ weight (y_i - y0). */
typedef struct choir_adapter_use {
    const choir_adapter *adapter;
    float weight;
} choir_adapter_use;
