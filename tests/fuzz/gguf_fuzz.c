/* Any bytes as a GGUF file: parsed or refused, never read out of bounds. */
#include "engine/engine.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    choir_gguf *gguf;
    if (choir_gguf_parse("fuzz", data, bytes, &gguf) != CHOIR_OK) return 0;
    for (uint64_t i = 0; i < choir_gguf_n_tensors(gguf); i++) {
        const choir_gguf_tensor *t = choir_gguf_tensor_at(gguf, i);
        const uint8_t *p = t->data;
        if (t->bytes > 0 && p[0] + p[t->bytes - 1] == 1000) return 1;
    }
    static const char *const keys[] = {"tokenizer.ggml.tokens", "tokenizer.ggml.scores", "a"};
    for (size_t k = 0; k < sizeof keys / sizeof *keys; k++) {
        const choir_gguf_array *a = choir_gguf_find_array(gguf, keys[k]);
        for (uint64_t i = 0; a != NULL && i < choir_gguf_array_count(a); i++) {
            choir_text text;
            int64_t integer;
            double real;
            if (choir_gguf_array_string(a, i, &text) && text.bytes > 0 && text.data[0] == text.data[text.bytes - 1])
                continue;
            (void)choir_gguf_array_integer(a, i, &integer);
            (void)choir_gguf_array_real(a, i, &real);
        }
    }
    choir_gguf_close(gguf);
    return 0;
}
