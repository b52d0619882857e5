/* Added tokens in a text: a trie over bytes, walked from every place where one may start. The
 * leftmost match is taken, the longest of those that start there. */
#include "engine/tokenizer_internal.h"

choir_status choir_added_insert(choir_added_trie *t, const char *text, size_t bytes, uint32_t token)
{
    if (t->n == 0) {
        CHOIR_TRY(choir_buffer_grow((void **)&t->nodes, 0, &t->capacity, 64, sizeof *t->nodes));
        t->nodes[t->n++] = (choir_added_node){0, 0, CHOIR_NO_ID, 0};
    }
    uint32_t at = 0;
    for (size_t i = 0; i < bytes; i++) {
        uint8_t byte = (uint8_t)text[i];
        uint32_t child = i == 0 ? t->root[byte] : t->nodes[at].first_child;
        while (child != 0 && t->nodes[child].byte != byte) child = t->nodes[child].next_sibling;
        if (child == 0) {
            if (t->n == t->capacity)
                CHOIR_TRY(
                    choir_buffer_grow((void **)&t->nodes, t->n, &t->capacity, 1, sizeof *t->nodes));
            child = (uint32_t)t->n++;
            uint32_t sibling = i == 0 ? 0 : t->nodes[at].first_child;
            t->nodes[child] = (choir_added_node){0, sibling, CHOIR_NO_ID, byte};
            if (i == 0)
                t->root[byte] = child;
            else
                t->nodes[at].first_child = child;
        }
        at = child;
    }
    if (bytes > 0 && t->nodes[at].token == CHOIR_NO_ID) t->nodes[at].token = token;
    t->any = t->any || bytes > 0;
    return CHOIR_OK;
}

void choir_added_destroy(choir_added_trie *t)
{
    choir_free(t->nodes);
    *t = (choir_added_trie){0};
}

/* The longest token that starts at text[at]; its end, or 0. */
static size_t longest_at(const choir_added_trie *t, const char *text, size_t bytes, size_t at,
                         uint32_t *token)
{
    size_t end = 0;
    uint32_t node = t->root[(uint8_t)text[at]];
    while (node != 0) {
        at++;
        if (t->nodes[node].token != CHOIR_NO_ID) {
            *token = t->nodes[node].token;
            end = at;
        }
        if (at == bytes) break;
        node = t->nodes[node].first_child;
        while (node != 0 && t->nodes[node].byte != (uint8_t)text[at])
            node = t->nodes[node].next_sibling;
    }
    return end;
}

static choir_status push(choir_spans *s, size_t begin, size_t end, uint32_t token)
{
    if (s->n == s->capacity)
        CHOIR_TRY(choir_buffer_grow((void **)&s->data, s->n, &s->capacity, 1, sizeof *s->data));
    s->data[s->n++] = (choir_span){begin, end, token};
    return CHOIR_OK;
}

static bool alone(const char *text, size_t bytes, size_t begin, size_t end)
{
    size_t before = begin > 0 ? choir_utf8_before(text, begin) : 0, after = end;
    if (begin > 0 && choir_unicode_word(choir_utf8_next(text, &before))) return false;
    return end == bytes || !choir_unicode_word(choir_utf8_next(text, &after));
}

static size_t skip_spaces(const char *text, size_t bytes, size_t at)
{
    for (size_t next = at; at < bytes; at = next)
        if (!choir_unicode_space(choir_utf8_next(text, &next))) break;
    return at;
}

choir_status choir_added_find(const choir_added_trie *t, const choir_added_token *tokens,
                              const char *text, size_t bytes, bool parse_special, choir_spans *out)
{
    size_t start = 0;    /* the first byte in no span yet */
    size_t stripped = 0; /* where the last spaces behind a token ended */
    for (size_t at = 0; t->any && at < bytes;) {
        uint32_t token;
        size_t end = longest_at(t, text, bytes, at, &token), begin = at;
        if (end == 0) {
            at++;
            continue;
        }
        at = end; /* a match that is refused below is passed over as a whole */
        const choir_added_token *a = &tokens[token];
        if (a->special && !parse_special) continue;
        if (a->single_word && !alone(text, bytes, begin, end)) continue;
        while (a->lstrip && begin > start) {
            size_t before = choir_utf8_before(text, begin), next = before;
            if (!choir_unicode_space(choir_utf8_next(text, &next))) break;
            begin = before;
        }
        /* A token within those spaces has the rest of them: they are not walked over again. */
        if (a->rstrip) end = stripped = end < stripped ? stripped : skip_spaces(text, bytes, end);
        if (start < begin) CHOIR_TRY(push(out, start, begin, CHOIR_NO_ID));
        CHOIR_TRY(push(out, begin, end, token));
        start = end;
    }
    if (start < bytes) CHOIR_TRY(push(out, start, bytes, CHOIR_NO_ID));
    return CHOIR_OK;
}
