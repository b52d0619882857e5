/* Qwen 3: norms on the heads of q and k, no biases (Yang et al. 2025). */
#include "engine/families/families.h"

const choir_family choir_family_qwen3 = {
    .name = "qwen3",
    .model_types = {"qwen3"},
    .architectures = {"qwen3"},
    .properties = {.qk_norm = CHOIR_QK_NORM_HEAD,
                   .roles = CHOIR_ROLE_BIT(ATTN_Q_NORM) | CHOIR_ROLE_BIT(ATTN_K_NORM)},
};
