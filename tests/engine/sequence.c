#include "tests/engine/sequence.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

void open_without_memory(const char *path, const choir_engine_options *options)
{
    for (uint64_t i = 1;; i++) {
        choir_engine *engine = NULL;
        choir_memory_fail_at(i);
        choir_status status = choir_engine_open(path, options, &engine);
        choir_memory_fail_at(0);
        if (status == CHOIR_OK) {
            choir_engine_close(engine);
            assert_true(i > 20);
            return;
        }
        assert_int_equal(status, CHOIR_E_NO_MEMORY);
        assert_true(strlen(choir_error_message()) > 10);
    }
}

sequence sequence_at(choir_engine *engine, uint32_t first_page, uint32_t n_pages)
{
    sequence s = {.engine = engine, .n_pages = n_pages};
    /* Descending, so that a table read the wrong way round shows. */
    for (uint32_t i = 0; i < n_pages; i++) s.pages[i] = first_page + n_pages - 1 - i;
    return s;
}

choir_span sequence_span(sequence *s, const uint32_t *tokens, uint32_t n, float *logits)
{
    return (choir_span){.tokens = tokens,
                        .n_tokens = n,
                        .position = s->position,
                        .pages = s->pages,
                        .n_pages = s->n_pages,
                        .n_logits = n,
                        .logits = logits};
}

void sequence_advance(sequence *s, const choir_span *span) { s->position += span->n_tokens; }

void sequence_run(sequence *s, const uint32_t *tokens, uint32_t n, uint32_t chunk, float *logits)
{
    uint32_t vocab = choir_engine_config(s->engine)->vocab;
    for (uint32_t at = 0; at < n; at += chunk) {
        uint32_t m = n - at < chunk ? n - at : chunk;
        choir_span span = sequence_span(s, tokens + at, m, logits + (size_t)at * vocab);
        choir_status status = choir_engine_step(s->engine, &span, 1);
        CHOIR_ASSERT(status == CHOIR_OK && span.status == CHOIR_OK);
        sequence_advance(s, &span);
    }
}
