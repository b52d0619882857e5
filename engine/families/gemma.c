/* Gemma 2 and 3: norms before and after each block, gelu, soft caps (2), every second or sixth
 * layer without a window, in Gemma 3 with a rope of its own (Gemma Team 2024, 2025). */
#include "engine/families/families.h"

#include <math.h>

#define LAYER "model.layers.%l."

static const choir_places hf = {
    [CHOIR_ROLE_ATTN_POST_NORM] = {LAYER "post_attention_layernorm.weight"},
    [CHOIR_ROLE_FFN_NORM] = {LAYER "pre_feedforward_layernorm.weight"},
    [CHOIR_ROLE_FFN_POST_NORM] = {LAYER "post_feedforward_layernorm.weight"},
};

static const choir_places gguf = {
    [CHOIR_ROLE_ATTN_POST_NORM] = {"blk.%l.post_attention_norm.weight"},
    [CHOIR_ROLE_FFN_POST_NORM] = {"blk.%l.post_ffw_norm.weight"},
};

/* query_pre_attn_scalar, until settle() makes a scale of it */
static const choir_key keys[] = {CHOIR_REAL("query_pre_attn_scalar", NULL, attention_scale), {0}};

#define POST_NORMS (CHOIR_ROLE_BIT(ATTN_POST_NORM) | CHOIR_ROLE_BIT(FFN_POST_NORM))
#define QK_NORMS   (CHOIR_ROLE_BIT(ATTN_Q_NORM) | CHOIR_ROLE_BIT(ATTN_K_NORM))

/* GGUF does not say the scalar: the 27B models alone have one that is not the head's size, hidden /
 * heads. */
static void settle(choir_model_config *c, bool from_gguf)
{
    if (from_gguf) {
        bool largest = c->n_layers == ((c->roles & QK_NORMS) != 0 ? 62 : 46);
        c->attention_scale = largest ? (float)(c->hidden / c->n_heads) : (float)c->head_dim;
    }
    if (c->attention_scale > 0) c->attention_scale = 1 / sqrtf(c->attention_scale);
    c->embedding_scale = sqrtf((float)c->hidden);
}

const choir_family choir_family_gemma2 = {
    .name = "gemma2",
    .model_types = {"gemma2"},
    .architectures = {"gemma2"},
    .properties = {.activation = CHOIR_GEGLU,
                   .attention_scale = 256,
                   .attention_softcap = 50,
                   .logit_softcap = 30,
                   .sliding_window = 4096,
                   .tied_head = true,
                   .roles = POST_NORMS},
    .windows = CHOIR_WINDOW_PERIOD,
    .window_period = 2,
    .norms_less_one = true,
    .scales_table = true,
    .keys = keys,
    .hf = hf,
    .gguf = gguf,
    .settle = settle,
};

const choir_family choir_family_gemma3 = {
    .name = "gemma3",
    .model_types = {"gemma3_text", "gemma3"},
    .architectures = {"gemma3"},
    .properties = {.activation = CHOIR_GEGLU,
                   .attention_scale = 256,
                   .qk_norm = CHOIR_QK_NORM_HEAD,
                   .rope = {.theta = 1000000},
                   .window_rope = {.theta = 10000},
                   .sliding_window = 4096,
                   .tied_head = true,
                   .n_heads = 8,
                   .n_kv_heads = 4,
                   .head_dim = 256,
                   .vocab = 262208,
                   .max_positions = 131072,
                   .roles = POST_NORMS | QK_NORMS},
    .windows = CHOIR_WINDOW_PERIOD,
    .window_period = 6,
    .norms_less_one = true,
    .scales_table = true,
    .keys = keys,
    .hf = hf,
    .gguf = gguf,
    .settle = settle,
};
