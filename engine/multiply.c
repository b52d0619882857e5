/* Products of activations and weights, cut over output rows: a worker's share never splits K, so
 * the bits do not depend on the number of workers. */
#include "engine/state.h"

/* A LayerNorm is an RMSNorm of what is left when the mean is gone, and a bias. */
void choir_norm_row(const choir_engine *e, norm w, const float *x, float *out)
{
    uint32_t hidden = e->config.hidden;
    if (e->config.layer_norm) {
        double sum = 0;
        for (uint32_t i = 0; i < hidden; i++) sum += (double)x[i];
        float mean = (float)(sum / hidden);
        for (uint32_t i = 0; i < hidden; i++) out[i] = x[i] - mean;
        x = out;
    }
    e->kernels->rms_norm(x, w.weight, e->config.norm_eps, hidden, out);
    if (w.bias != NULL) e->kernels->add(out, w.bias, hidden);
}

void choir_norm_rows(choir_engine *e, layer_norm w, float *h, uint8_t *q8, uint32_t worker,
                     uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        norm own = *w.norm;
        own.weight = choir_adapt_norm(e, w.role, w.layer, i, own.weight);
        choir_norm_row(e, own, s->x + i * hidden, h + i * hidden);
    }
    if (q8 != NULL && begin < end && !e->options.exact)
        e->kernels->quantize(h, hidden, q8, (uint32_t)begin, (uint32_t)end);
}

static uint64_t n_grains(const choir_matrix *m)
{
    return (m->rows + CHOIR_PACK_ROWS - 1) / CHOIR_PACK_ROWS;
}

void choir_meet_for_series(choir_engine *e, const adapt_target *target, activations y,
                           uint32_t n_rows, uint32_t worker, uint32_t n_workers)
{
    uint64_t begin, end;
    if (!choir_adapts_series(e, target->role)) return;
    choir_workers_sync(e->workers);
    choir_share(n_rows, 1, worker, n_workers, &begin, &end);
    choir_adapt_shrink_outputs(e, target, y, (uint32_t)begin, (uint32_t)end);
    choir_workers_sync(e->workers);
}

void choir_multiply(choir_engine *e, const product *products, uint32_t n_products,
                    const choir_acts *acts, const adapt_target *next, uint32_t worker,
                    uint32_t n_workers)
{
    const activations in = {acts->x, acts->cols};
    const choir_acts own = choir_acts_fetching(e, acts, worker);
    uint64_t total = 0, begin, end, at = 0;
    choir_adapt_fetch_begin(e, worker);
    if (next != NULL) choir_adapt_fetch_inputs(e, next, worker, n_workers);
    for (uint32_t i = 0; i < n_products; i++) total += n_grains(products[i].matrix);
    choir_share(total, 1, worker, n_workers, &begin, &end);
    for (uint32_t i = 0; i < n_products; i++) {
        const choir_matrix *m = products[i].matrix;
        uint64_t n = n_grains(m), first = begin > at ? begin - at : 0;
        uint64_t last = end > at ? end - at : 0;
        if (last > n) last = n;
        uint32_t start = (uint32_t)(first < last ? first : last) * CHOIR_PACK_ROWS;
        uint64_t stop = last * CHOIR_PACK_ROWS;
        if (stop > m->rows) stop = m->rows;
        choir_adapt_fetch_outputs(e, &products[i].target, acts->n_rows, worker, start,
                                  (uint32_t)stop);
        if (start < stop)
            e->kernels->matmul(m, &own, products[i].y, m->rows, start, (uint32_t)stop);
        choir_meet_for_series(e, &products[i].target, (activations){products[i].y, m->rows},
                              acts->n_rows, worker, n_workers);
        choir_adapt_expand(e, &products[i].target, in, acts->n_rows, products[i].y, m->rows, start,
                           (uint32_t)stop);
        at += n;
    }
}

/* The rows' blocks end in norms of their own (Gemma): whole rows are needed. */
static void add_normed(choir_engine *e, const float *weight, float *y, uint32_t worker,
                       uint32_t n_workers)
{
    step *s = &e->step;
    uint32_t hidden = e->config.hidden;
    uint64_t begin, end;
    choir_share(s->n_rows, 1, worker, n_workers, &begin, &end);
    for (uint64_t i = begin; i < end; i++) {
        e->kernels->rms_norm(y + i * hidden, weight, e->config.norm_eps, hidden, y + i * hidden);
        e->kernels->add_scaled(s->x + i * hidden, y + i * hidden, e->config.residual_scale, hidden);
    }
}

void choir_multiply_into_residual(choir_engine *e, const residual_product *p, uint32_t worker,
                                  uint32_t n_workers)
{
    uint64_t begin, end;
    float scale = e->config.residual_scale;
    uint32_t hidden = p->matrix->rows, n_rows = p->acts.n_rows;
    choir_share(hidden, CHOIR_PACK_ROWS, worker, n_workers, &begin, &end);
    uint32_t n = (uint32_t)(end - begin);
    const choir_acts acts = choir_acts_fetching(e, &p->acts, worker);
    choir_adapt_fetch_begin(e, worker);
    choir_adapt_fetch_outputs(e, &p->target, n_rows, worker, (uint32_t)begin, (uint32_t)end);
    for (uint32_t i = 0; i < p->n_next; i++)
        choir_adapt_fetch_inputs(e, &p->next[i], worker, n_workers);
    if (n > 0) e->kernels->matmul(p->matrix, &acts, p->y, hidden, (uint32_t)begin, (uint32_t)end);
    choir_meet_for_series(e, &p->target, (activations){p->y, hidden}, n_rows, worker, n_workers);
    choir_adapt_expand(e, &p->target, (activations){p->acts.x, p->acts.cols}, n_rows, p->y, hidden,
                       (uint32_t)begin, (uint32_t)end);
    for (size_t i = 0; n > 0 && i < n_rows; i++) {
        float *own = p->y + i * hidden + begin, *x = e->step.x + i * hidden + begin;
        if (p->bias != NULL) e->kernels->add(own, p->bias + begin, n);
        if (p->post_norm == NULL && scale == 1)
            e->kernels->add(x, own, n);
        else if (p->post_norm == NULL)
            e->kernels->add_scaled(x, own, scale, n);
    }
    choir_workers_sync(e->workers);
    if (p->post_norm == NULL) return;
    add_normed(e, p->post_norm, p->y, worker, n_workers);
    choir_workers_sync(e->workers);
}
