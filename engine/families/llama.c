/* Llama 1 to 3 and what is shaped like them: SmolLM, TinyLlama, Yi (Touvron et al. 2023). */
#include "engine/families/families.h"

const choir_family choir_family_llama = {
    .name = "llama",
    .model_types = {"llama"},
    .architectures = {"llama"},
    .gguf_interleaved_rope = true,
};
