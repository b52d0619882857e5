/* Which experts are computed from the smaller copy that a pack may hold: of each layer a share,
 * those that its usage numbers call the rarest. It is settled before anything is loaded and holds
 * for all requests: were it to depend on what is in memory, a sequence's bits would depend on its
 * neighbours. */
#include "engine/pack_file.h"
#include "engine/state.h"

#include <math.h>
#include <xxhash.h>

/* True: among the n least used of its layer; of two that are used alike the higher number is. */
static bool is_rare(const choir_pack *pack, uint32_t layer_index, uint32_t expert,
                    uint32_t n_experts, uint32_t n)
{
    float own = choir_pack_usage(pack, layer_index, expert);
    uint32_t rarer = 0;
    for (uint32_t x = 0; x < n_experts; x++) {
        float usage = choir_pack_usage(pack, layer_index, x);
        rarer += usage < own || (usage == own && x > expert);
    }
    return rarer < n;
}

choir_status choir_small_plan(choir_engine *e, const choir_model_file *file)
{
    const choir_model_config *c = &e->config;
    const choir_pack *pack = choir_model_file_pack(file);
    double share = e->options.small_experts;
    if (share == 0) return CHOIR_OK;
    if (pack == NULL || !choir_pack_has_small(pack))
        return choir_fail(CHOIR_E_PRECONDITION,
                          "%s holds no small copies of its experts (--small-experts): `choir pack "
                          "--small q3 --usage ROUTES.jsonl` makes them",
                          e->path);
    uint32_t n = (uint32_t)lround(share * c->n_experts);
    if (n < c->n_experts && !choir_pack_has_usage(pack))
        return choir_fail(CHOIR_E_PRECONDITION,
                          "%s does not say which experts are rare: pack it with --usage "
                          "ROUTES.jsonl, or take the small copies of all (--small-experts 1)",
                          e->path);
    if (n == 0) return CHOIR_OK;
    size_t total = (size_t)c->n_layers * c->n_experts;
    e->small = choir_calloc(CHOIR_MEM_EXPERTS, total, sizeof *e->small);
    if (e->small == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for %zu experts", total);
    for (uint32_t l = 0; l < c->n_layers; l++)
        for (uint32_t x = 0; (c->layers[l] & CHOIR_LAYER_MOE) != 0 && x < c->n_experts; x++)
            e->small[(size_t)l * c->n_experts + x] = is_rare(pack, l, x, c->n_experts, n);
    return CHOIR_OK;
}

uint64_t choir_small_weigh(const choir_engine *e, const choir_model_file *file, uint64_t experts)
{
    const choir_pack *pack = choir_model_file_pack(file);
    for (uint32_t l = 0; l < e->config.n_layers; l++)
        for (uint32_t x = 0; x < e->config.n_experts; x++) {
            if (!choir_expert_is_small(e, l, x)) continue;
            experts -= choir_pack_find_run(pack, l, x)->bytes;
            for (int i = 0; i < CHOIR_EXPERT_PARTS; i++)
                experts += choir_round_up(choir_pack_find_small(pack, l, x)[i].bytes, 64);
        }
    return experts;
}

uint64_t choir_small_digest(const choir_engine *e, uint64_t digest)
{
    size_t n = (size_t)e->config.n_layers * e->config.n_experts;
    return e->small == NULL ? digest : XXH3_64bits_withSeed(e->small, n, digest);
}
