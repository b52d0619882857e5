/* WHAT    A router version on disk: a small JSON file named after its own digest, which says what the policy is, what it
 *         was learnt from and whose child it is.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  CHOIR_E_FORMAT (damaged, or not a version; the sentence names the file), CHOIR_E_NOT_FOUND, CHOIR_E_IO,
 *         CHOIR_E_NO_MEMORY.
 * LIMITS  A file is there whole or not at all, and its name is the digest of its bytes: what was changed is not loaded. The same
 *         version has the same bytes, whoever wrote it.
 * NEXT    router/learn/learner.h */
#pragma once
#include "router/learn/policy.h"

enum { CHOIR_DIGEST_TEXT = 33 }; /* XXH3 with 128 bits in hexadecimal, and a NUL */

typedef struct choir_version {
    char model[CHOIR_MAX_SCOPE_NAME];
    char parent[CHOIR_DIGEST_TEXT]; /* "": none */
    uint64_t learnt_to, n_learnt;   /* the last journal sequence it has learnt from, and how many answers */
    uint64_t feature_seed;          /* of choir_features_make() */
    uint32_t n_blocks;              /* where its features are taken (engine/engine.h, choir_probe) */
    uint32_t n_plans;
    struct {
        char name[CHOIR_MAX_PLAN_NAME];
        uint64_t digest; /* of the weights that it adds */
    } plans[CHOIR_MAX_CANDIDATES];
    choir_routing policy;
} choir_version;

/* Writes FOLDER/DIGEST.json, durably. */
choir_status choir_version_save(const char *folder, const choir_version *version, char digest[CHOIR_DIGEST_TEXT])
    CHOIR_MUST_USE;
choir_status choir_version_load(const char *folder, const char *digest, choir_version *out) CHOIR_MUST_USE;
