/* Adapters of the simulated model: each shifts the letters of its answers. They lie on a real disk
 * and are read by the real pool. A folder's adapter_config.json says {"shift": 3, "bytes": 4096},
 * and "sole", "poison" or "make_ms" where it is meant to be so. Its adapter_model.safetensors is a
 * header of ten bytes, and then "bytes" times the shift: make() refuses any other byte or length, so
 * that a cut or a torn read is seen. */
#pragma once
#include "scheduler/scheduler.h"

choir_status simulated_adapters_create(const char *folder, uint64_t budget_bytes,
                                       choir_adapters **out) CHOIR_MUST_USE;
/* What a span's adapters shift its letters by, each by its weight. *poison: one of them wants NaN.
 */
int simulated_adapters_shift(const choir_span *span, bool *poison);
