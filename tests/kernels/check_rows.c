/* Row kernels: odd lengths around the vector width, extreme values, in-place use. */
#include "tests/kernels/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const uint32_t lengths[] = {1,  2,  7,  8,  9,  15,  16,  17,  31,   32,  33,
                                   47, 63, 64, 65, 96, 100, 127, 576, 1536, 4099};
enum { N_LENGTHS = sizeof lengths / sizeof *lengths };

typedef struct row_case {
    const choir_kernels *ref, *k;
    const float *x, *y;
    uint32_t n;
} row_case;

static guarded copy_of(const float *x, uint32_t n)
{
    guarded g = check_alloc(n * sizeof *x);
    memcpy(g.data, x, n * sizeof *x);
    return g;
}

/* Runs CALL twice, with `t` the table and `out` the output, which begins as a copy of c->x. */
#define COMPARE(name, CALL)                                                                        \
    do {                                                                                           \
        guarded expected = copy_of(c->x, c->n), got = copy_of(c->x, c->n);                         \
        const choir_kernels *t = c->ref;                                                           \
        float *out = expected.data;                                                                \
        CALL;                                                                                      \
        t = c->k;                                                                                  \
        out = got.data;                                                                            \
        CALL;                                                                                      \
        check_same(check_label("%s n=%u", name, c->n), &expected, &got);                           \
        check_free(&expected);                                                                     \
        check_free(&got);                                                                          \
    } while (0)

static void check_length(const row_case *c)
{
    COMPARE("rms_norm", t->rms_norm(c->x, c->y, 1e-5F, c->n, out));
    COMPARE("rms_norm in place, no weight", t->rms_norm(out, NULL, 1e-6F, c->n, out));
    COMPARE("silu_mul", t->silu_mul(c->x, c->y, c->n, out));
    COMPARE("silu_mul in place", t->silu_mul(out, c->y, c->n, out));
    COMPARE("gelu_mul", t->gelu_mul(c->x, c->y, c->n, out));
    COMPARE("clamped_swiglu", t->clamped_swiglu(c->x, c->y, 1.702F, 0.5F, c->n, out));
    COMPARE("softcap", t->softcap(out, 0.8F, c->n));
    COMPARE("add", t->add(out, c->y, c->n));
    COMPARE("add_scaled", t->add_scaled(out, c->y, 0.37F, c->n));
    COMPARE("f32_to_f16", t->f32_to_f16(c->x, c->n, (uint16_t *)out));
    COMPARE("f16_to_f32", t->f16_to_f32(c->x, c->n, out)); /* any bits are halves */
    COMPARE("max", out[0] = t->max(c->x, c->n));
    COMPARE(
        "sum_exp", do {
            double sum = t->sum_exp(c->x, 3.0F, c->n);
            memcpy(out, &sum, c->n > 1 ? sizeof sum : sizeof *out);
        } while (0));
    for (int interleaved = 0; interleaved < 2; interleaved++)
        COMPARE("rope", t->rope(out, c->n & ~1U, interleaved != 0, c->y, c->y + c->n / 2));
}

static void check_quantize(const choir_kernels *ref, const choir_kernels *k, const float *x,
                           uint32_t n_rows, uint32_t cols, const char *what)
{
    size_t bytes = choir_acts_q8_bytes(n_rows, cols);
    guarded expected = check_alloc(bytes), got = check_alloc(bytes);
    ref->quantize(x, cols, expected.data, 0, n_rows);
    k->quantize(x, cols, got.data, n_rows / 2, n_rows); /* parts, as workers do it */
    k->quantize(x, cols, got.data, 0, n_rows / 2);
    check_same(check_label("quantize %s cols=%u", what, cols), &expected, &got);
    check_free(&expected);
    check_free(&got);
}

/* Values at the edges of what floats can be. A NaN's sign and digits may differ, hence two tables.
 */
static void check_extremes(const choir_kernels *ref, const choir_kernels *k)
{
    static const float finite[] = {
        0.0F,       -0.0F,    1e-45F,   -1e-39F,  1.17549435e-38F, 6e-8F,   -5.9e-8F, 6.1e-5F,
        0.0009765F, 65504.0F, 65519.9F, 65520.0F, -7e4F,           3e38F,   -3e38F,   88.7F,
        -87.4F,     -103.9F,  0.5F,     1.0F / 3, 2049.0F,         2051.0F, -1.0F};
    enum { N = sizeof finite / sizeof *finite };
    float x[96], y[96];
    for (uint32_t i = 0; i < 96; i++) {
        x[i] = finite[i % N];
        y[i] = 1.0F;
    }
    const row_case all = {ref, k, x, y, N}, *c = &all;
    COMPARE("silu_mul, extremes", t->silu_mul(c->x, c->y, c->n, out));
    COMPARE("gelu_mul, extremes", t->gelu_mul(c->x, c->y, c->n, out));
    COMPARE("clamped_swiglu, extremes", t->clamped_swiglu(c->x, c->y, 1.702F, 7, c->n, out));
    COMPARE("softcap, extremes", t->softcap(out, 30, c->n));
    COMPARE("f32_to_f16, extremes", t->f32_to_f16(c->x, c->n, (uint16_t *)out));
    static const uint16_t halves[] = {0,      0x8000, 1,      0x8001, 0x3FF,  0x400,
                                      0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00,
                                      0x7C01, 0x7DFF, 0x7E00, 0xFFFF};
    const row_case of_halves = {ref, k, x, y, sizeof halves / sizeof *halves};
    c = &of_halves;
    COMPARE("f16_to_f32, extremes", t->f16_to_f32(halves, c->n, out));
    c = &all;
    COMPARE(
        "sum_exp, extremes", do {
            double sum = t->sum_exp(c->x, 0, c->n);
            memcpy(out, &sum, sizeof sum);
        } while (0));
    check_quantize(ref, k, x, 1, 96, "extremes");
    memset(x, 0, sizeof x);
    x[40] = 1e-38F; /* as good as zero */
    check_quantize(ref, k, x, 1, 96, "zeros");
    x[3] = INFINITY;
    x[70] = NAN;
    check_quantize(ref, k, x, 1, 96, "Inf and NaN");
    check_true("sum_exp shows a NaN", isnan(k->sum_exp(x, 1.0F, 96)));
    k->silu_mul(x, y, 96, x);
    check_true("silu keeps Inf and NaN", isinf(x[3]) && isnan(x[70]));
}

/* The formulas themselves, in double: what the reference is held to. */
static void check_formulas(const choir_kernels *k)
{
    for (int i = -60; i <= 60; i++) {
        float x = (float)i * 0.25F, up = 0.5F - (float)i, gelu, swiglu, capped = x;
        double g = x, u = up, clamped = fmin(g, 7), wide = fmax(-7, fmin(u, 7));
        k->gelu_mul(&x, &up, 1, &gelu);
        k->clamped_swiglu(&x, &up, 1.702F, 7, 1, &swiglu);
        k->softcap(&capped, 3, 1);
        double expected = 0.5 * g * (1 + tanh(sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
        check_true("gelu by its formula", fabs(gelu - expected) <= 1e-5 * (1 + fabs(expected)));
        expected = (wide + 1) * clamped / (1 + exp(-1.702 * clamped));
        check_true("clamped_swiglu by its formula",
                   fabs(swiglu - expected) <= 1e-6 * (1 + fabs(expected)));
        check_true("softcap by its formula", fabs(capped - 3 * tanh(g / 3)) <= 1e-6);
    }
}

void check_rows(const choir_kernels *ref, const choir_kernels *k)
{
    check_formulas(ref);
    enum { MAX = 4099 + 1 };
    float *x = malloc(2 * MAX * sizeof *x), *y = x + MAX;
    CHOIR_ASSERT(x != NULL);
    for (uint32_t i = 0; i < N_LENGTHS; i++) {
        check_floats(x, 2 * MAX);
        const row_case c = {ref, k, x, y, lengths[i]};
        check_length(&c);
        uint32_t n_rows = 2 * MAX / lengths[i] < 5 ? 1 : 5;
        check_quantize(ref, k, x, n_rows, lengths[i], "rows");
    }
    free(x);
    check_extremes(ref, k);
}
