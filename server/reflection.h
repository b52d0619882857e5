/* WHAT    The reflection service's database: which file declares which symbol, from the embedded
 *         descriptors; one request's bytes in, one response's bytes out.
 * OWNS    Its index; the descriptors stay where they are.
 * THREADS Read-only once made: any.
 * ERRORS  CHOIR_E_INVALID for a malformed request; an unknown name is an error inside the response.
 * LIMITS  v1 and v1alpha have the same bytes, so that one database answers both.
 * NEXT    server/methods.c */
#pragma once
#include "base/error.h"

typedef struct choir_reflection choir_reflection;

/* `set`: a google.protobuf.FileDescriptorSet; lent until destroy. */
choir_status choir_reflection_create(const uint8_t *set, size_t bytes,
                                     choir_reflection **out) CHOIR_MUST_USE;
void choir_reflection_destroy(choir_reflection *reflection);

/* *out is choir_free()d by the caller. */
choir_status choir_reflection_answer(const choir_reflection *reflection, const uint8_t *request,
                                     size_t bytes, uint8_t **out, size_t *out_bytes) CHOIR_MUST_USE;
