/* OLMoE: softmax over all experts, norms over the full width of q and k (Muennighoff et al. 2024).
 */
#include "engine/families/families.h"

static const choir_key keys[] = {
    CHOIR_COUNT("intermediate_size", "feed_forward_length", expert_hidden), {0}};

const choir_family choir_family_olmoe = {
    .name = "olmoe",
    .model_types = {"olmoe"},
    .architectures = {"olmoe"},
    .moe = true,
    .properties = {.qk_norm = CHOIR_QK_NORM_FULL,
                   .roles = CHOIR_ROLE_BIT(ATTN_Q_NORM) | CHOIR_ROLE_BIT(ATTN_K_NORM)},
    .keys = keys,
};
