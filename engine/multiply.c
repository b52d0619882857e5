/* Products of activations and weights, cut over output rows: a worker's share never splits K, so the
 * bits do not depend on the number of workers. */
#include "engine/state.h"

void choir_norm_rows(choir_engine *e, const float *weight, float *h, uint8_t *q8, uint32_t worker,
                     uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++)
        e->kernels->rms_norm(s->x + i * hidden, weight, e->config.norm_eps, hidden, h + i * hidden);
    if (q8 != NULL && begin < end)
        e->kernels->quantize(h, hidden, q8, (uint32_t)begin, (uint32_t)end);
}

static uint64_t n_grains(const choir_matrix *m)
{
    return (m->rows + CHOIR_PACK_ROWS - 1) / CHOIR_PACK_ROWS;
}

void choir_multiply(const choir_engine *e, const product *products, uint32_t n_products,
                    const choir_acts *acts, uint32_t worker, uint32_t n_workers)
{
    uint64_t total = 0, begin, end, at = 0;
    for (uint32_t i = 0; i < n_products; i++) total += n_grains(products[i].matrix);
    choir_share(total, 1, worker, n_workers, &begin, &end);
    for (uint32_t i = 0; i < n_products; i++) {
        const choir_matrix *m = products[i].matrix;
        uint64_t n = n_grains(m), first = begin > at ? begin - at : 0;
        uint64_t last = end > at ? end - at : 0;
        if (last > n) last = n;
        if (first < last) {
            uint64_t stop = last * CHOIR_PACK_ROWS;
            e->kernels->matmul(m, acts, products[i].y, m->rows, (uint32_t)first * CHOIR_PACK_ROWS,
                               stop < m->rows ? (uint32_t)stop : m->rows);
        }
        at += n;
    }
}

void choir_multiply_into_residual(const choir_engine *e, const choir_matrix *w,
                                  const choir_acts *acts, float *y, float *x, uint32_t worker,
                                  uint32_t n_workers)
{
    uint64_t begin, end;
    choir_share(w->rows, CHOIR_PACK_ROWS, worker, n_workers, &begin, &end);
    if (begin == end) return;
    e->kernels->matmul(w, acts, y, w->rows, (uint32_t)begin, (uint32_t)end);
    for (size_t i = 0; i < acts->n_rows; i++)
        e->kernels->add(x + i * w->rows + begin, y + i * w->rows + begin, (uint32_t)(end - begin));
}
