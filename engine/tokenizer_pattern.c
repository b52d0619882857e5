/* Patterns at work: literals by memmem, expressions by PCRE2. What is matched, and where a search
 * goes on after an empty match, is as the reference's iterator does it. */
#include "engine/tokenizer_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include "engine/tokenizer_regex.h"
#include "engine/tokenizer_unicode.h"

#include <pcre2.h>
#include <string.h>

enum {
    MAX_SOURCE = 16 << 10, /* bytes of a pattern as written */
    MAX_CODE = 1 << 20,    /* bytes of its compiled code */
    MAX_NESTING = 64,      /* parentheses */
    CHEAP_STEPS = 4096,    /* what any single match may cost without being charged */
    /* What a match may keep to backtrack by: so much, and so much for each byte of the text,
     * because a group that is repeated keeps every round. */
    STACK = 4 << 20,
    STACK_PER_BYTE = 128,
    HEAP = 64 << 20, /* the interpreter's frames, when the JIT's stack is too small */
    HEAP_PER_BYTE = 512,
    MOST = 1 << 30,
};

static size_t most_memory(size_t least, size_t per_byte, size_t bytes)
{
    return bytes > (MOST - least) / per_byte ? MOST : least + per_byte * bytes;
}

struct choir_pattern {
    char *literal; /* NULL: an expression */
    size_t literal_bytes;
    pcre2_code *code;
    pcre2_general_context *memory;
    bool jit;
};

static void *give(PCRE2_SIZE bytes, void *user)
{
    (void)user;
    return choir_alloc(CHOIR_MEM_TOKENIZER, bytes);
}

static void take(void *p, void *user)
{
    (void)user;
    choir_free(p);
}

static choir_status compile(const char *where, const choir_bytes *translated, choir_pattern *p)
{
    p->memory = pcre2_general_context_create(give, take, NULL);
    pcre2_compile_context *limits = NULL;
    if (p->memory != NULL) limits = pcre2_compile_context_create(p->memory);
    if (limits == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a pattern");
    pcre2_set_newline(limits, PCRE2_NEWLINE_LF); /* never fails on this constant */
    pcre2_set_parens_nest_limit(limits, MAX_NESTING);
    pcre2_set_max_pattern_length(limits, translated->n);
    int error;
    PCRE2_SIZE offset;
    /* (?m) of PCRE2 is what ^ and $ always mean in Ruby: the start and end of any line. */
    p->code = pcre2_compile((PCRE2_SPTR)translated->data, translated->n,
                            PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                            &error, &offset, limits);
    pcre2_compile_context_free(limits);
    if (p->code == NULL) {
        if (error == PCRE2_ERROR_HEAP_FAILED)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a pattern");
        PCRE2_UCHAR why[128];
        pcre2_get_error_message(error, why, sizeof why);
        return choir_fail(CHOIR_E_FORMAT, "%s: the pattern does not compile: %s (near \"%.*s\")",
                          where, (char *)why, 20,
                          offset < translated->n ? translated->data + offset : "its end");
    }
    size_t size = 0;
    pcre2_pattern_info(p->code, PCRE2_INFO_SIZE, &size);
    if (size > MAX_CODE)
        return choir_fail(CHOIR_E_FORMAT, "%s: the pattern compiles to %zu bytes; the limit is %d",
                          where, size, MAX_CODE);
    /* Without JIT the interpreter gives the same matches, more slowly. */
    p->jit = pcre2_jit_compile(p->code, PCRE2_JIT_COMPLETE) == 0;
    return CHOIR_OK;
}

choir_status choir_pattern_compile(const char *where, const char *source, size_t bytes,
                                   bool literal, choir_pattern **out)
{
    if (bytes > MAX_SOURCE)
        return choir_fail(CHOIR_E_FORMAT, "%s: a pattern of %zu bytes; the limit is %d", where,
                          bytes, MAX_SOURCE);
    choir_pattern *p = choir_calloc(CHOIR_MEM_TOKENIZER, 1, sizeof *p);
    if (p == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a pattern");
    choir_status status;
    choir_bytes translated = {0};
    if (literal) {
        p->literal = choir_alloc(CHOIR_MEM_TOKENIZER, bytes + 1);
        status = p->literal != NULL ? CHOIR_OK
                                    : choir_fail(CHOIR_E_NO_MEMORY, "no memory for a pattern");
        if (status == CHOIR_OK) memcpy(p->literal, source, bytes);
        p->literal_bytes = bytes;
    } else {
        status = choir_regex_translate(where, source, bytes, &translated);
        if (status == CHOIR_OK) status = compile(where, &translated, p);
    }
    choir_free(translated.data);
    if (status != CHOIR_OK) {
        choir_pattern_destroy(p);
        return status;
    }
    *out = p;
    return CHOIR_OK;
}

void choir_pattern_destroy(choir_pattern *p)
{
    if (p == NULL) return;
    pcre2_code_free(p->code);
    pcre2_general_context_free(p->memory);
    choir_free(p->literal);
    choir_free(p);
}

bool choir_pattern_is_character(const choir_pattern *p)
{
    return p->literal != NULL && p->literal_bytes > 0 &&
           choir_utf8_length((uint8_t)p->literal[0]) == p->literal_bytes;
}

void choir_match_allow(choir_match *m, size_t bytes)
{
    m->budget = 100000000;
    choir_match_allow_more(m, bytes);
}

void choir_match_allow_more(choir_match *m, size_t bytes)
{
    m->budget += 2000 * (uint64_t)bytes;
}

void choir_match_free(choir_match *m)
{
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->context);
    pcre2_jit_stack_free(m->stack);
    *m = (choir_match){0};
}

void choir_match_begin(choir_match *m, const char *text, size_t bytes)
{
    m->text = text;
    m->bytes = bytes;
    m->at = m->last_end = 0;
    m->matched = false;
}

static choir_status prepare(const choir_pattern *p, choir_match *m)
{
    if (m->context != NULL) return CHOIR_OK;
    m->data = pcre2_match_data_create(1, p->memory);
    m->context = pcre2_match_context_create(p->memory);
    if (m->data == NULL || m->context == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory to match a pattern");
    return CHOIR_OK;
}

/* The JIT's stack, which the system fills with pages as they are used; false: there is none. */
static bool enlarge_stack(const choir_pattern *p, choir_match *m)
{
    size_t most = most_memory(STACK, STACK_PER_BYTE, m->bytes);
    if (m->stack_bytes >= most) return false;
    pcre2_jit_stack_free(m->stack);
    m->stack = pcre2_jit_stack_create(32 << 10, most, p->memory);
    m->stack_bytes = m->stack != NULL ? most : 0;
    pcre2_jit_stack_assign(m->context, NULL, m->stack);
    return m->stack != NULL;
}

/* PCRE2 comes by behind every repetition, forwards or on its way back. The way since the last time
 * is what the repetition took. */
static int count_steps(pcre2_callout_block *block, void *user)
{
    choir_match *m = user;
    size_t now = block->current_position;
    size_t steps = 1 + (now > m->counted_to ? now - m->counted_to : m->counted_to - now);
    m->counted_to = now;
    if (steps > m->budget) return PCRE2_ERROR_CALLOUT;
    m->budget -= steps;
    return 0;
}

/* A search with growing limits: cheap ones are free, dear ones are paid from the budget of the
 * text, so that all searches of one encode together cost no more than a constant times its length.
 */
static choir_status search(const choir_pattern *p, choir_match *m, int *result)
{
    CHOIR_TRY(prepare(p, m));
    uint32_t limit = CHEAP_STEPS;
    bool jit = p->jit;
    m->counted_to = m->at;
    pcre2_set_callout(m->context, count_steps, m);
    pcre2_set_heap_limit(m->context, (uint32_t)(most_memory(HEAP, HEAP_PER_BYTE, m->bytes) >> 10));
    for (;;) {
        pcre2_set_match_limit(m->context, limit);
        PCRE2_SPTR text = (PCRE2_SPTR)m->text;
        *result = jit ? pcre2_jit_match(p->code, text, m->bytes, m->at, PCRE2_NO_UTF_CHECK, m->data,
                                        m->context)
                      : pcre2_match(p->code, text, m->bytes, m->at,
                                    PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, m->data, m->context);
        if (*result >= 0 || *result == PCRE2_ERROR_NOMATCH) return CHOIR_OK;
        if (*result == PCRE2_ERROR_JIT_STACKLIMIT) {
            jit = enlarge_stack(p, m);
            continue;
        }
        if (*result == PCRE2_ERROR_NOMEMORY)
            return choir_fail(CHOIR_E_NO_MEMORY, "no memory to match a pattern");
        if (*result != PCRE2_ERROR_MATCHLIMIT || m->budget <= limit || limit > UINT32_MAX / 4)
            return choir_fail(
                CHOIR_E_INVALID,
                "the tokenizer's pattern needs too many steps on this text, near its byte "
                "%zu of %zu",
                m->at, m->bytes);
        m->budget -= limit;
        limit *= 4;
    }
}

static choir_status next_literal(const choir_pattern *p, choir_match *m, size_t *begin, size_t *end,
                                 bool *found)
{
    const char *hit = NULL;
    if (p->literal_bytes > 0 && m->bytes - m->at >= p->literal_bytes) {
        const char *from = m->text + m->at;
        hit = p->literal_bytes == 1 ? memchr(from, p->literal[0], m->bytes - m->at)
                                    : memmem(from, m->bytes - m->at, p->literal, p->literal_bytes);
    }
    *found = hit != NULL;
    if (hit == NULL) return CHOIR_OK;
    *begin = (size_t)(hit - m->text);
    *end = m->at = *begin + p->literal_bytes;
    return CHOIR_OK;
}

choir_status choir_match_next(const choir_pattern *p, choir_match *m, size_t *begin, size_t *end,
                              bool *found)
{
    if (p->literal != NULL) return next_literal(p, m, begin, end, found);
    *found = false;
    while (m->at <= m->bytes) {
        int result;
        CHOIR_TRY(search(p, m, &result));
        if (result == PCRE2_ERROR_NOMATCH) return CHOIR_OK;
        const PCRE2_SIZE *span = pcre2_get_ovector_pointer(m->data);
        if (span[0] == span[1] && m->matched && m->last_end == span[1]) {
            /* An empty match right behind the last one is passed over, one character on. */
            m->at += m->at < m->bytes ? choir_utf8_length((uint8_t)m->text[m->at]) : 1;
            continue;
        }
        m->at = m->last_end = *end = span[1];
        *begin = span[0];
        m->matched = *found = true;
        return CHOIR_OK;
    }
    return CHOIR_OK;
}
