/* WHAT    What the token path needs to know of a model, whatever its family or file: sizes, and the
 *         properties that it branches on.
 * OWNS    Nothing.
 * THREADS Read-only once a file is open.
 * ERRORS  None; engine/model_config.c checks every number (nonzero, divisible, bounded).
 * LIMITS  CHOIR_MAX_LAYERS layers, 64 roles.
 * NEXT    engine/families/families.h, where a family sets them; engine/token_path.c, which reads them. */
#pragma once
#include "base/base.h"
#include "router/router.h"

enum { CHOIR_MAX_LAYERS = 1024, CHOIR_MAX_EOS = 16, CHOIR_MAX_ROPE_DIVISORS = 256 };

typedef enum choir_rope_scaling {
    CHOIR_ROPE_NONE,
    CHOIR_ROPE_LINEAR,   /* positions / factor (Chen et al. 2023) */
    CHOIR_ROPE_LLAMA3,   /* frequencies scaled by wavelength (Llama 3.1) */
    CHOIR_ROPE_YARN,     /* high frequencies kept, low ones divided, a ramp between (Peng et al. 2023) */
    CHOIR_ROPE_DYNAMIC,  /* the base grows with the position beyond the original context (NTK) */
    CHOIR_ROPE_LONGROPE, /* a divisor per frequency, one set for short and one for long contexts */
} choir_rope_scaling;

typedef struct choir_rope_config {
    float theta; /* 0: the model has no such rope */
    choir_rope_scaling scaling;
    float factor;
    float low_freq_factor, high_freq_factor; /* LLAMA3 */
    float beta_fast, beta_slow;              /* YARN: rotations over the original context */
    bool untruncated;                        /* YARN: the ramp's ends are not rounded */
    float attention_factor, long_attention_factor; /* multiply cos and sin; LONGROPE has two */
    uint32_t original_max_positions;         /* before scaling */
    uint32_t rotary_dims;                    /* of a head; the others pass */
    uint32_t exponent_dims;                  /* frequencies are theta^(-2i / exponent_dims); 0: rotary_dims */
    bool interleaved;                        /* pairs (2i, 2i + 1), else (i, i + rotary_dims / 2) */
} choir_rope_config;

typedef enum choir_qk_norm {
    CHOIR_QK_NORM_NONE,
    CHOIR_QK_NORM_HEAD, /* RMSNorm of each head of q and k (Qwen 3) */
    CHOIR_QK_NORM_FULL, /* RMSNorm of the whole q and k rows (OLMoE) */
} choir_qk_norm;

typedef enum choir_activation {
    CHOIR_SWIGLU,         /* silu(gate) up */
    CHOIR_GEGLU,          /* gelu(gate) up, gelu in its tanh form (Gemma) */
    CHOIR_CLAMPED_SWIGLU, /* (up + 1) gate sigmoid(alpha gate), both clamped (gpt-oss) */
} choir_activation;

/* Of one layer. */
enum {
    CHOIR_LAYER_MOE = 1,
    CHOIR_LAYER_WINDOW = 2,  /* attends to the last sliding_window keys */
    CHOIR_LAYER_CHUNKED = 4, /* attends within its chunk of attention_chunk positions */
    CHOIR_LAYER_NO_ROPE = 8,
};

struct choir_family;

typedef struct choir_model_config {
    const struct choir_family *family;
    char name[128];
    uint32_t n_layers, hidden, vocab, max_positions;
    uint8_t layers[CHOIR_MAX_LAYERS]; /* CHOIR_LAYER_ flags */
    uint64_t roles;                   /* bit r: the model has tensors of the optional role r */

    /* attention */
    uint32_t n_heads, n_kv_heads, head_dim;
    /* Latent attention: keys and values are made of a latent of kv_lora_rank numbers (0: they are not),
     * a key's position lies in rope_dim numbers beside it. head_dim is nope_dim + rope_dim then. */
    uint32_t kv_lora_rank, q_lora_rank, nope_dim, rope_dim, value_dim;
    uint32_t sliding_window, attention_chunk; /* 0: none */
    float attention_scale;                    /* of q k */
    float attention_softcap;                  /* 0: none */
    /* Layers without rope: q (1 + scale log(1 + floor((position + 1) / floor))); floor 0: no such thing. */
    float temperature_floor, temperature_scale;
    choir_qk_norm qk_norm;
    bool qk_norm_after_rope, qk_norm_unweighted; /* unweighted: only in layers with rope */
    choir_rope_config rope, window_rope; /* window_rope.theta 0: layers with a window have the same rope */
    /* LONGROPE of Hugging Face folders; GGUF files have tensors */
    float short_divisors[CHOIR_MAX_ROPE_DIVISORS], long_divisors[CHOIR_MAX_ROPE_DIVISORS];

    /* the residual stream */
    bool layer_norm; /* LayerNorm with bias instead of RMSNorm */
    float norm_eps, latent_norm_eps;
    float embedding_scale, residual_scale;
    float logit_divisor, logit_softcap; /* 0: none */
    bool tied_head;

    /* feed-forward */
    choir_activation activation;
    float swiglu_alpha, swiglu_limit;
    uint32_t ffn_hidden;    /* width of dense layers */
    uint32_t n_experts;     /* 0: dense */
    uint32_t n_experts_used;
    uint32_t expert_hidden; /* an expert's width */
    uint32_t shared_hidden; /* width of the expert that every token has; 0: none */
    choir_gate gate;
    bool weigh_input; /* an expert's input is multiplied by its weight, not its output (Llama 4) */

    int32_t bos_id, eos_ids[CHOIR_MAX_EOS], pad_id; /* -1: none */
    uint32_t n_eos;
    /* from generation_config.json or GGUF's general.sampling; negative or 0 (temperature: negative) =
     * not given */
    float temperature, top_p;
    int32_t top_k;
    float repetition_penalty;
    char licence[64]; /* "" when the file does not say */
} choir_model_config;

const char *choir_model_config_family(const choir_model_config *config); /* "mixtral" */

/* What lies in the KV pages for a token and layer: heads, and numbers of a key and of a value. A latent
 * key holds its value. */
static inline bool choir_is_latent(const choir_model_config *c) { return c->kv_lora_rank > 0; }
static inline uint32_t choir_kv_heads(const choir_model_config *c)
{
    return choir_is_latent(c) ? 1 : c->n_kv_heads;
}
static inline uint32_t choir_key_dim(const choir_model_config *c)
{
    return choir_is_latent(c) ? c->kv_lora_rank + c->rope_dim : c->head_dim;
}
static inline uint32_t choir_kv_value_dim(const choir_model_config *c)
{
    return choir_is_latent(c) ? c->kv_lora_rank : c->head_dim;
}
/* Numbers of a token and layer in the KV pages. */
static inline uint32_t choir_kv_numbers(const choir_model_config *c)
{
    uint32_t values = choir_is_latent(c) ? 0 : choir_kv_value_dim(c);
    return choir_kv_heads(c) * (choir_key_dim(c) + values);
}
/* The width of what the output projection takes. */
static inline uint32_t choir_attended(const choir_model_config *c)
{
    return c->n_heads * (choir_is_latent(c) ? c->value_dim : c->head_dim);
}
