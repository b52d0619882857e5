/* SmolLM3: llama in which every fourth layer has no rope (Hugging Face 2025). */
#include "engine/families/families.h"

const choir_family choir_family_smollm3 = {
    .name = "smollm3",
    .model_types = {"smollm3"},
    .architectures = {"smollm3"},
    .properties = {.tied_head = true},
    .rope_period = 4,
    .gguf_interleaved_rope = true,
};
