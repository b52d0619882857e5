#include "tests/support/reference.h"

#include "base/base.h"

#include <string.h>

static const uint32_t *take(const char **at, uint64_t words)
{
    const uint32_t *p = (const uint32_t *)*at;
    *at += words * 4;
    return p;
}

reference reference_open(const char *path)
{
    reference r = {0};
    size_t bytes;
    choir_status status = choir_file_read(path, 64 << 20, &r.file, &bytes);
    CHOIR_ASSERT(status == CHOIR_OK && bytes > 24 && memcmp(r.file, "CREF", 4) == 0);
    const char *at = r.file + 4;
    const uint32_t *head = take(&at, 5);
    r.vocab = head[1];
    r.n_layers = head[2];
    r.k = head[3];
    r.n_prompts = head[4];
    CHOIR_ASSERT(head[0] == 1 && r.n_prompts <= 16);
    for (uint32_t i = 0; i < r.n_prompts; i++) {
        reference_prompt *p = &r.prompts[i];
        p->n_tokens = *take(&at, 1);
        p->ids = take(&at, p->n_tokens);
        p->logits = (const float *)take(&at, (uint64_t)p->n_tokens * r.vocab);
        p->experts = take(&at, (uint64_t)r.n_layers * p->n_tokens * r.k);
        p->weights = (const float *)take(&at, (uint64_t)r.n_layers * p->n_tokens * r.k);
        p->n_greedy = *take(&at, 1);
        p->greedy = take(&at, p->n_greedy);
        p->margins = (const float *)take(&at, p->n_greedy);
    }
    CHOIR_ASSERT(at == r.file + bytes);
    return r;
}

void reference_close(reference *r) { choir_free(r->file); }
