/* A config.json, and behind a zero byte a generation_config.json: read or refused; what passes the
 * check has shapes that the token path can divide by. */
#include "engine/model_config.h"
#include "tests/fuzz/two_files.h"

#include <math.h>

static void check_config(const choir_model_config *c)
{
    CHOIR_ASSERT(c->family != NULL && c->n_layers > 0 && c->vocab > 0 && c->hidden > 0);
    CHOIR_ASSERT(c->n_heads % c->n_kv_heads == 0 && c->rope.rotary_dims <= c->head_dim);
    CHOIR_ASSERT(c->n_experts_used <= c->n_experts);
    CHOIR_ASSERT(isfinite(c->norm_eps) && isfinite(c->rope.theta) && isfinite(c->rope.factor));
    CHOIR_ASSERT(isfinite(c->temperature) && isfinite(c->top_p) && isfinite(c->repetition_penalty));
    CHOIR_ASSERT(c->n_eos <= sizeof c->eos_ids / sizeof *c->eos_ids);
    CHOIR_ASSERT(c->bos_id >= -1 && c->bos_id < (int64_t)c->vocab && c->pad_id < (int64_t)c->vocab);
    CHOIR_ASSERT(c->pad_id >= -1 && c->top_k >= 0);
    for (uint32_t i = 0; i < c->n_eos; i++) CHOIR_ASSERT(c->eos_ids[i] >= 0);
    CHOIR_ASSERT(memchr(c->name, '\0', sizeof c->name) != NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const char *folder = write_two_files("config.json", "generation_config.json", data, bytes);
    choir_model_config c;
    choir_status status = choir_config_read_hf(&(choir_texts){.path = folder}, &c);
    if (status == CHOIR_OK) status = choir_config_check(folder, &c);
    if (status == CHOIR_OK) check_config(&c);
    CHOIR_ASSERT(status != CHOIR_E_INTERNAL && status != CHOIR_E_IO && status != CHOIR_E_NOT_FOUND);
    return 0;
}
