/* What quantisation leaves over. */
#include "engine/kernels/layout.h"

void choir_acts_residual(const float *x, uint32_t cols, const void *q8, float *residual,
                         uint32_t begin, uint32_t end)
{
    acts_layout l = choir_acts_layout(cols);
    for (size_t row = begin; row < end; row++) {
        const int8_t *high = (const int8_t *)q8 + row * l.row_bytes, *low = high + l.low_at;
        const float *d = (const float *)(high + l.d_at);
        for (uint32_t k = 0; k < cols; k++)
            residual[row * cols + k] =
                x[row * cols + k] - d[k / BLOCK] * (float)(256 * high[k] + low[k]);
    }
}
