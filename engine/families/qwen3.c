/* Qwen 3: norms on the heads of q and k, no biases (Yang et al. 2025). */
#include "engine/families/families.h"

const choir_family choir_family_qwen3 = {
    .name = "qwen3",
    .model_type = "qwen3",
    .architecture = "qwen3",
    .qk_norm = CHOIR_QK_NORM_HEAD,
};
