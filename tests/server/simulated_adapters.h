/* Adapters of the simulated model: each shifts the letters of its answers. They lie on a real disk
 * and are read by the real pool. A folder holds adapter_config.json        {"shift": 3, "bytes":
 * 4096, "sole": false, "poison": false, "make_ms": 0} adapter_model.safetensors  eight bytes with
 * the header's length (2), "{}", then bytes that are all the shift so that a cut or a torn read is
 * seen: make() refuses other bytes, and a length that is not "bytes". */
#pragma once
#include "scheduler/scheduler.h"

choir_status simulated_adapters_create(const char *folder, uint64_t budget_bytes,
                                       choir_adapters **out) CHOIR_MUST_USE;
/* What a span's adapters shift its letters by, each by its weight. *poison: one of them wants NaN.
 */
int simulated_adapters_shift(const choir_span *span, bool *poison);
