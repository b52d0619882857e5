/* Any bytes as a safetensors file: parsed or refused, never read out of bounds. */
#include "engine/engine.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    choir_safetensors *file;
    if (choir_safetensors_parse("fuzz", data, bytes, &file) != CHOIR_OK) return 0;
    for (size_t i = 0; i < choir_safetensors_count(file); i++) {
        const choir_safetensor *t = choir_safetensors_at(file, i);
        const uint8_t *p = t->data;
        if (t->bytes > 0 && p[0] + p[t->bytes - 1] == 1000) return 1;
        if (choir_safetensors_find(file, t->name) == NULL) __builtin_trap();
    }
    choir_safetensors_close(file);
    return 0;
}
