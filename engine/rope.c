/* Rotary positions (Su et al. 2021): a step's angles, under the scalings that stretch a model's
 * context. */
#include "engine/state.h"

#include <math.h>

struct rope_table {
    const choir_rope_config *config;
    uint32_t half;          /* frequencies: rotary_dims / 2 */
    float attention_factor; /* of cos and sin */
    float *inv_freq;        /* [half] */
};

/* Base frequencies theta^(-2d / n), f32 as the reference implementations have them. */
static float frequency(const choir_rope_config *r, float theta, uint32_t d)
{
    uint32_t n = r->exponent_dims > 0 ? r->exponent_dims : r->rotary_dims;
    return 1.0F / powf(theta, (float)(2 * d) / (float)n);
}

/* Llama 3.1: long wavelengths are stretched by `factor`, with a blend in between. */
static float scale_llama3(const choir_rope_config *r, float f)
{
    float wavelength = 2.0F * (float)M_PI / f, original = (float)r->original_max_positions;
    float smooth =
        (original / wavelength - r->low_freq_factor) / (r->high_freq_factor - r->low_freq_factor);
    if (wavelength > original / r->low_freq_factor) return f / r->factor;
    return wavelength >= original / r->high_freq_factor ? (1 - smooth) * f / r->factor + smooth * f
                                                        : f;
}

/* The frequency's index that turns so often over the original context. */
static double yarn_index(const choir_rope_config *r, uint32_t half, double rotations)
{
    return half * log(r->original_max_positions / (rotations * 2 * M_PI)) / log(r->theta);
}

/* Peng et al. 2023, section 3.2: frequencies that turn often are kept, slow ones divided, a ramp
 * between. */
static float scale_yarn(const choir_rope_config *r, float f, uint32_t d, uint32_t half)
{
    double low = yarn_index(r, half, r->beta_fast), high = yarn_index(r, half, r->beta_slow);
    if (!r->untruncated) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, 2 * half - 1);
    if (low == high) high += 0.001;
    float ramp = ((float)d - (float)low) / ((float)high - (float)low);
    ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
    return f / r->factor * ramp + f * (1 - ramp);
}

static float scaled(const choir_rope_config *r, uint32_t d, uint32_t half)
{
    float f = frequency(r, r->theta, d);
    switch (r->scaling) {
    case CHOIR_ROPE_LINEAR:
        return f / r->factor;
    case CHOIR_ROPE_LLAMA3:
        return scale_llama3(r, f);
    case CHOIR_ROPE_YARN:
        return scale_yarn(r, f, d, half);
    default:
        return f;
    }
}

/* A GGUF file's divisors of the frequencies, or `given` (NULL: ones). */
static choir_status read_divisors(choir_engine *e, const choir_model_file *file, choir_role role,
                                  const float *given, const float **out)
{
    choir_tensor t;
    *out = given;
    if ((e->config.roles >> role & 1) == 0) return CHOIR_OK;
    CHOIR_TRY(choir_model_file_tensor(file, role, 0, 0, &t));
    float *values = choir_arena_alloc(e->vectors, t.cols * sizeof *values);
    if (values == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for rope");
    choir_tensor_row(&t, 0, values);
    *out = values;
    return CHOIR_OK;
}

static choir_status create(choir_engine *e, const choir_rope_config *config, const float *divisors,
                           float attention_factor, rope_table **out)
{
    uint32_t half = config->rotary_dims / 2;
    rope_table *t = choir_arena_alloc(e->vectors, sizeof *t);
    float *values = choir_arena_alloc(e->vectors, (size_t)half * sizeof *values);
    if (t == NULL || values == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for rope");
    *t = (rope_table){config, half, attention_factor, values};
    for (uint32_t d = 0; d < half; d++) {
        float f = scaled(config, d, half);
        t->inv_freq[d] = divisors != NULL ? f / divisors[d] : f;
    }
    *out = t;
    return CHOIR_OK;
}

/* Longrope: which set of divisors holds, the one for sequences beyond the original context or the
 * other (docs/decisions/0006). */
static bool is_long(const choir_engine *e)
{
    uint32_t most = e->config.max_positions, wanted = e->options.max_context;
    if (wanted > 0 && wanted < most) most = wanted;
    return e->config.rope.scaling == CHOIR_ROPE_LONGROPE &&
           most > e->config.rope.original_max_positions;
}

choir_status choir_rope_create(choir_engine *e, const choir_model_file *file)
{
    const choir_model_config *c = &e->config;
    bool longer = is_long(e);
    const float *divisors = NULL;
    if (c->rope.scaling == CHOIR_ROPE_LONGROPE && choir_model_file_gguf(file) == NULL)
        divisors = longer ? c->long_divisors : c->short_divisors;
    CHOIR_TRY(read_divisors(e, file, CHOIR_ROLE_ROPE_FACTORS, divisors, &divisors));
    CHOIR_TRY(read_divisors(e, file, longer ? CHOIR_ROLE_ROPE_LONG : CHOIR_ROLE_ROPE_SHORT,
                            divisors, &divisors));
    float factor = longer ? c->rope.long_attention_factor : c->rope.attention_factor;
    CHOIR_TRY(create(e, &c->rope, divisors, factor, &e->rope));
    if (c->window_rope.theta == 0) return CHOIR_OK;
    return create(e, &c->window_rope, NULL, c->window_rope.attention_factor, &e->window_rope);
}

/* Dynamic scaling: a position beyond the original context stretches the base (NTK). A row depends
 * on its own position alone, so that chunks and batches never matter; decoding token by token,
 * Hugging Face's implementation does the same (docs/decisions/0006). */
static void fill_row(const rope_table *t, uint32_t position, float *cos_row, float *sin_row)
{
    const choir_rope_config *r = t->config;
    bool stretched = r->scaling == CHOIR_ROPE_DYNAMIC && position >= r->original_max_positions;
    float theta = r->theta;
    if (stretched) {
        float n = (float)(2 * t->half), length = (float)position + 1;
        float original = (float)r->original_max_positions;
        theta *= powf(r->factor * length / original - (r->factor - 1), n / (n - 2));
    }
    for (uint32_t d = 0; d < t->half; d++) {
        float f = stretched ? frequency(r, theta, d) : t->inv_freq[d];
        float angle = (float)position * f;
        cos_row[d] = cosf(angle) * t->attention_factor;
        sin_row[d] = sinf(angle) * t->attention_factor;
    }
}

void choir_rope_rows(const choir_engine *e, uint64_t begin, uint64_t end)
{
    const step *s = &e->step;
    for (uint64_t i = begin; i < end; i++) {
        uint32_t position = s->rows[i].position, half = e->rope->half;
        fill_row(e->rope, position, s->rope.cos + i * half, s->rope.sin + i * half);
        if (e->window_rope != NULL)
            fill_row(e->window_rope, position, s->window_rope.cos + i * half,
                     s->window_rope.sin + i * half);
    }
}
