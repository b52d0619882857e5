/* llama.cpp's GGUF LoRA files: a pair NAME.lora_a and NAME.lora_b for each tensor NAME of the
 * base's GGUF file, scaled by adapter.lora.alpha / rank; all experts of a layer in one pair. */
#include "engine/adapter_read.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

static bool says(const choir_adapter_reader *r, const char *key, const char *value)
{
    choir_text text;
    return choir_gguf_string(r->gguf, key, &text) && text.bytes == strlen(value) &&
           memcmp(text.data, value, text.bytes) == 0;
}

static const char *text_of(const choir_adapter_reader *r, const char *key, char *out, size_t bytes)
{
    choir_text text = {"", 0};
    choir_gguf_string(r->gguf, key, &text);
    snprintf(out, bytes, "%.*s", (int)(text.bytes < 60 ? text.bytes : 60), text.data);
    return out;
}

/* An architecture may be another family's too: what counts is that both place their tensors alike.
 */
static bool is_of_base(const choir_adapter_reader *r, const char *architecture)
{
    const choir_family *base = r->base->family;
    const choir_family *f = choir_family_of_architecture(architecture, base->moe);
    return f != NULL && (f == base || (f->hf == base->hf && f->gguf == base->gguf &&
                                       f->gguf_interleaved_rope == base->gguf_interleaved_rope));
}

static choir_status check_header(const choir_adapter_reader *r)
{
    char text[64];
    if (!says(r, "general.type", "adapter"))
        return choir_fail(CHOIR_E_INVALID,
                          "%s: general.type is \"%s\", of an adapter it is \"adapter\"", r->name,
                          text_of(r, "general.type", text, sizeof text));
    if (!says(r, "adapter.type", "lora"))
        return choir_fail(CHOIR_E_UNIMPLEMENTED, "%s: adapter.type is \"%s\"; Choir reads \"lora\"",
                          r->name, text_of(r, "adapter.type", text, sizeof text));
    if (!is_of_base(r, text_of(r, "general.architecture", text, sizeof text)))
        return choir_fail(CHOIR_E_INVALID,
                          "%s: general.architecture is \"%s\", which is not the base's (%s)",
                          r->name, text, r->base->family->name);
    return CHOIR_OK;
}

static choir_status read_invocation(choir_adapter_reader *r)
{
    const char *key = "adapter.alora.invocation_tokens";
    const choir_gguf_array *tokens = choir_gguf_find_array(r->gguf, key);
    uint64_t n = tokens == NULL ? 0 : choir_gguf_array_count(tokens);
    if (n > CHOIR_ADAPTER_MAX_INVOCATION)
        return choir_fail(CHOIR_E_INVALID, "%s: %s has %" PRIu64 " tokens, the limit is %d",
                          r->name, key, n, CHOIR_ADAPTER_MAX_INVOCATION);
    for (uint64_t i = 0; i < n; i++) {
        int64_t id;
        if (!choir_gguf_array_integer(tokens, i, &id) || id < 0 || id >= r->base->vocab)
            return choir_fail(CHOIR_E_INVALID,
                              "%s: token %" PRIu64 " of %s is none of the base's %u", r->name, i,
                              key, r->base->vocab);
        r->data->invocation[r->data->n_invocation++] = (uint32_t)id;
    }
    return CHOIR_OK;
}

static choir_status read_pair(choir_adapter_reader *r, choir_adapter_tensor *a, double alpha)
{
    char name[CHOIR_ADAPTER_MAX_NAME];
    const char *suffix = ".lora_a";
    if (snprintf(name, sizeof name, "%s", a->name) >= (int)sizeof name)
        return choir_adapter_refuse(r, a->name);
    choir_adapter_strip(name, suffix);
    choir_adapter_spot spot = choir_adapter_find_spot(r, name);
    if (spot.n_places == 0 || choir_adapter_is_vector(spot.places[0]->role))
        return choir_adapter_refuse(r, a->name);
    CHOIR_TRY(choir_adapter_check_spot(r, &spot, a->name));
    choir_adapter_pair p = {.a = a, .b = choir_adapter_beside(r, a->name, suffix, ".lora_b")};
    if (p.b == NULL)
        return choir_fail(CHOIR_E_INVALID, "%s: tensor '%.200s' has no lora_b beside it", r->name,
                          a->name);
    double rank = p.b->n_dims > 0 ? (double)p.b->dims[p.b->n_dims - 1] : 0;
    CHOIR_TRY(choir_adapter_check_rank(r, rank, "the rank", a->name));
    p.rank = (uint32_t)rank;
    p.scale = alpha == 0 ? 1 : (float)(alpha / rank);
    if (!isfinite(p.scale))
        return choir_fail(CHOIR_E_INVALID, "%s: adapter.lora.alpha is %g", r->name, alpha);
    if (spot.places[0]->role == CHOIR_ROLE_EMBEDDING)
        return choir_adapter_add_embedding(r, &spot, &p);
    return spot.places[0]->stacked ? choir_adapter_add_stack(r, &spot, &p)
                                   : choir_adapter_add_pair(r, &spot, &p);
}

choir_status choir_adapter_read_gguf(choir_adapter_reader *r)
{
    double alpha = 0;
    CHOIR_TRY(check_header(r));
    CHOIR_TRY(choir_adapter_make_places(r, true));
    choir_gguf_real(r->gguf, "adapter.lora.alpha", &alpha);
    CHOIR_TRY(read_invocation(r));
    snprintf(r->data->kind, sizeof r->data->kind, r->data->n_invocation > 0 ? "aLoRA" : "LoRA");
    for (size_t i = 0; i < r->n_tensors; i++)
        if (choir_adapter_ends_with(r->tensors[i].name, ".lora_a"))
            CHOIR_TRY(read_pair(r, &r->tensors[i], alpha));
    /* Norms that were trained with it, as mergekit extracts them; llama.cpp leaves them out. */
    for (size_t i = 0; i < r->n_tensors; i++) {
        choir_adapter_tensor *t = &r->tensors[i];
        if (t->used || !choir_adapter_ends_with(t->name, "_norm.weight")) continue;
        choir_adapter_spot spot = choir_adapter_find_spot(r, t->name);
        if (spot.n_places > 0) CHOIR_TRY(choir_adapter_add_whole(r, &spot, t, 0));
    }
    return CHOIR_OK;
}
