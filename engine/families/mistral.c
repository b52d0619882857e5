/* Mistral 7B: llama with a sliding window in its first version (Jiang et al. 2023). */
#include "engine/families/families.h"

const choir_family choir_family_mistral = {
    .name = "mistral",
    .model_types = {"mistral"},
    .architectures = {"mistral"},
    .windows = CHOIR_WINDOW_ALL,
    .gguf_interleaved_rope = true,
};
