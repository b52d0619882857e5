/* Qwen 2 and 2.5: llama with biases on q, k and v (Yang et al. 2024). */
#include "engine/families/families.h"

const choir_family choir_family_qwen2 = {
    .name = "qwen2",
    .model_types = {"qwen2"},
    .architectures = {"qwen2"},
    .properties = {.roles = CHOIR_BIASES_QKV},
};
