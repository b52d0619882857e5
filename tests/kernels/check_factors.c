/* Low-rank factors: every type, odd ranks and lengths, row counts around the tiles, strides wider
 * than rows. */
#include "tests/kernels/check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const uint32_t ranks[] = {1, 2, 3, 4, 5, 8, 16, 33},
                      lengths[] = {1, 15, 16, 17, 48, 79, 576, 1536};
static const uint32_t row_counts[] = {1, 2, 3, 4, 5, 9};
enum { N_RANKS = 8, N_LENGTHS = 8, N_COUNTS = 6, PAD = 3, MAX_LENGTH = 1536 };

typedef struct factor_case {
    const choir_kernels *ref, *k;
    choir_factor f;
    uint32_t n_rows;
} factor_case;

static void check_shrink(const factor_case *c)
{
    size_t ldx = c->f.length + PAD, ldt = c->f.rank + PAD;
    float *x = malloc(c->n_rows * ldx * sizeof *x);
    CHOIR_ASSERT(x != NULL);
    check_floats(x, c->n_rows * ldx);
    guarded expected = check_alloc(c->n_rows * ldt * sizeof *x),
            got = check_alloc(c->n_rows * ldt * sizeof *x);
    c->ref->shrink(&c->f, x, ldx, c->n_rows, expected.data, ldt);
    c->k->shrink(&c->f, x, ldx, c->n_rows, got.data, ldt);
    check_same(check_label("shrink type=%d rank=%u length=%u rows=%u", c->f.type, c->f.rank,
                           c->f.length, c->n_rows),
               &expected, &got);
    check_free(&expected);
    check_free(&got);
    free(x);
}

static void check_expand(const factor_case *c)
{
    size_t ldy = c->f.length + PAD, ldt = c->f.rank + PAD, bytes = c->n_rows * ldy * sizeof(float);
    uint32_t cut = c->f.length / 2 & ~15U;
    float *t = malloc(c->n_rows * ldt * sizeof *t);
    guarded expected = check_alloc(bytes), got = check_alloc(bytes);
    CHOIR_ASSERT(t != NULL);
    check_floats(t, c->n_rows * ldt);
    check_floats(expected.data, bytes / sizeof(float));
    memcpy(got.data, expected.data, bytes);
    c->ref->expand(&c->f, t, ldt, c->n_rows, expected.data, ldy, 0, c->f.length);
    c->k->expand(&c->f, t, ldt, c->n_rows, got.data, ldy, cut,
                 c->f.length); /* in parts, as workers do */
    c->k->expand(&c->f, t, ldt, c->n_rows, got.data, ldy, 0, cut);
    check_same(check_label("expand type=%d rank=%u length=%u rows=%u", c->f.type, c->f.rank,
                           c->f.length, c->n_rows),
               &expected, &got);
    check_free(&expected);
    check_free(&got);
    free(t);
}

/* What was packed comes back within the type's precision: shrink of unit vectors. */
static void check_pack(const choir_kernels *k, choir_factor_type type)
{
    enum { RANK = 3, N = 21 };
    static const float tolerance[] = {0, 0x1p-11F, 0x1p-8F, 0.5F / 127};
    float scratch[N], from[N * RANK], unit[N] = {0}, t[RANK];
    check_floats(from, N * RANK);
    guarded data = check_alloc(choir_factor_bytes(type, RANK, N));
    choir_factor f =
        choir_factor_pack(type, &(choir_factor_source){from, RANK, N, 1, RANK, 1, NULL}, scratch,
                          data.data); /* turned */
    for (uint32_t i = 0; i < N; i++) {
        unit[i] = 1;
        k->shrink(&f, unit, N, 1, t, RANK);
        unit[i] = 0;
        for (uint32_t r = 0; r < RANK; r++) {
            float value = from[i * RANK + r], max = fabsf(value);
            for (uint32_t j = 0; type != CHOIR_FACTOR_BF16 && j < N; j++)
                max = fmaxf(max, fabsf(from[j * RANK + r]));
            check_true("a packed factor's values",
                       fabsf(t[r] - value) <= max * tolerance[type] * 1.0001F);
        }
    }
    check_true("a packed factor stays within its bytes", check_guards(&data));
    check_free(&data);
}

void check_factors(const choir_kernels *ref, const choir_kernels *k)
{
    float scales[MAX_LENGTH], scratch[MAX_LENGTH];
    check_floats(scales, MAX_LENGTH);
    for (int type = 0; type < CHOIR_N_FACTOR_TYPES; type++) {
        check_pack(k, (choir_factor_type)type);
        for (int r = 0; r < N_RANKS; r++)
            for (int l = 0; l < N_LENGTHS; l++) {
                float *from = malloc((size_t)ranks[r] * lengths[l] * sizeof *from);
                guarded data =
                    check_alloc(choir_factor_bytes((choir_factor_type)type, ranks[r], lengths[l]));
                CHOIR_ASSERT(from != NULL);
                check_floats(from, (size_t)ranks[r] * lengths[l]);
                const choir_factor_source source = {from, ranks[r], lengths[l], lengths[l],
                                                    1,    0.75F,    scales};
                factor_case c = {
                    ref, k, choir_factor_pack((choir_factor_type)type, &source, scratch, data.data),
                    0};
                for (int n = 0; n < N_COUNTS; n++) {
                    c.n_rows = row_counts[n];
                    check_shrink(&c);
                    check_expand(&c);
                }
                check_true("factors keep to their bytes", check_guards(&data));
                check_free(&data);
                free(from);
            }
    }
}
