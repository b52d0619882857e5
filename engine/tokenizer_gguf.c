/* A tokenizer from a GGUF file's metadata: byte-level BPE ("gpt2") with a pre-tokenizer known by
 * name, or SentencePiece's BPE by scores ("llama"). */
#include "engine/gguf.h"
#include "engine/tokenizer_gguf_pre.h"
#include "engine/tokenizer_internal.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define KEY(name) "tokenizer.ggml." name

/* What tokenizer.ggml.token_type says of each id. */
enum { TYPE_NORMAL = 1, TYPE_UNKNOWN, TYPE_CONTROL, TYPE_USER_DEFINED, TYPE_UNUSED, TYPE_BYTE };

typedef struct reader {
    const choir_gguf *gguf;
    choir_tokenizer *t;
    const choir_gguf_array *tokens, *types; /* types may be NULL: all normal */
    uint32_t n;
} reader;

static choir_status bad(const char *key, const char *why)
{
    return choir_fail(CHOIR_E_FORMAT, "GGUF metadata %s: %s", key, why);
}

static int64_t type_of(const reader *r, uint32_t id)
{
    int64_t type = TYPE_NORMAL;
    if (r->types != NULL) choir_gguf_array_integer(r->types, id, &type);
    return type;
}

static bool flag(const reader *r, const char *key, bool missing)
{
    int64_t value;
    return choir_gguf_integer(r->gguf, key, &value) ? value != 0 : missing;
}

/* ---- vocabulary */
static choir_status read_tokens(reader *r)
{
    r->tokens = choir_gguf_find_array(r->gguf, KEY("tokens"));
    r->types = choir_gguf_find_array(r->gguf, KEY("token_type"));
    if (r->tokens == NULL) return bad(KEY("tokens"), "an array of strings is wanted");
    uint64_t n = choir_gguf_array_count(r->tokens);
    if (n == 0 || n > UINT32_MAX / 4) return bad(KEY("tokens"), "its length is of no use");
    if (r->types != NULL && choir_gguf_array_count(r->types) != n)
        return bad(KEY("token_type"), "it is not as long as tokenizer.ggml.tokens");
    r->n = (uint32_t)n;
    size_t text_bytes = 0;
    choir_text piece;
    for (uint32_t i = 0; i < r->n; i++) {
        if (!choir_gguf_array_string(r->tokens, i, &piece))
            return bad(KEY("tokens"), "an array of strings is wanted");
        text_bytes += piece.bytes;
    }
    CHOIR_TRY(choir_vocab_create(&r->t->vocab, r->n, text_bytes, r->n));
    for (uint32_t i = 0; i < r->n; i++) {
        if (!choir_gguf_array_string(r->tokens, i, &piece))
            return bad(KEY("tokens"), "a broken array");
        if (choir_utf8_check(piece.data, piece.bytes) != piece.bytes)
            return choir_fail(CHOIR_E_FORMAT,
                              "GGUF metadata " KEY("tokens") "[%u] is not valid UTF-8", i);
        CHOIR_TRY(choir_vocab_add(&r->t->vocab, i, piece.data, piece.bytes));
    }
    return CHOIR_OK;
}

/* Control and unknown tokens are special; what the user defined is found in any text. */
static choir_status read_added(reader *r)
{
    for (uint32_t i = 0; i < r->n; i++) {
        int64_t type = type_of(r, i);
        choir_text piece;
        if (type != TYPE_CONTROL && type != TYPE_USER_DEFINED && type != TYPE_UNKNOWN) continue;
        if (!choir_gguf_array_string(r->tokens, i, &piece)) continue;
        choir_added_token a = {.special = type != TYPE_USER_DEFINED};
        CHOIR_TRY(choir_tokenizer_add_token(r->t, piece.data, piece.bytes, a));
    }
    return CHOIR_OK;
}

/* An id by its key: -1 when the key is absent. */
static choir_status read_id(const reader *r, const char *key, int32_t *out)
{
    int64_t id;
    *out = -1;
    if (!choir_gguf_integer(r->gguf, key, &id)) return CHOIR_OK;
    if (id == -1 || id == UINT32_MAX) return CHOIR_OK; /* some writers say so for "none" */
    if (id < 0 || id >= r->n)
        return choir_fail(CHOIR_E_FORMAT, "GGUF metadata %s is %lld; the vocabulary has %u ids",
                          key, (long long)id, r->n);
    *out = (int32_t)id;
    return CHOIR_OK;
}

static choir_status read_special(reader *r, bool add_bos)
{
    choir_tokenizer *t = r->t;
    CHOIR_TRY(read_id(r, KEY("bos_token_id"), &t->bos));
    CHOIR_TRY(read_id(r, KEY("eos_token_id"), &t->eos));
    if (flag(r, KEY("add_bos_token"), add_bos) && t->bos >= 0)
        CHOIR_TRY(choir_tokenizer_add_post(t, t->bos));
    CHOIR_TRY(choir_tokenizer_add_post(t, CHOIR_POST_TEXT));
    if (flag(r, KEY("add_eos_token"), false) && t->eos >= 0)
        CHOIR_TRY(choir_tokenizer_add_post(t, t->eos));
    return read_added(r);
}

/* ---- steps */
static choir_status make_text(const char *text, char **out, size_t *bytes)
{
    *bytes = strlen(text);
    *out = choir_strdup(CHOIR_MEM_TOKENIZER, text);
    return *out != NULL ? CHOIR_OK : choir_fail(CHOIR_E_NO_MEMORY, "no memory for a tokenizer");
}

/* " " becomes "▁"; with a prefix, text starts with one. */
static choir_status mark_spaces(choir_tokenizer *t, bool prefix)
{
    choir_normal_step *step;
    if (prefix) {
        CHOIR_TRY(choir_tokenizer_add_normal(t, CHOIR_NORMAL_PREPEND, &step));
        CHOIR_TRY(make_text("\xE2\x96\x81", &step->content, &step->content_bytes));
    }
    CHOIR_TRY(choir_tokenizer_add_normal(t, CHOIR_NORMAL_REPLACE, &step));
    CHOIR_TRY(make_text("\xE2\x96\x81", &step->content, &step->content_bytes));
    return choir_pattern_compile("spaces", " ", 1, true, &step->pattern);
}

/* "▁" becomes " ", byte tokens become text, and one space before it all goes again. */
static choir_status unmark_spaces(choir_tokenizer *t, bool prefix)
{
    choir_decode_stage *stage;
    CHOIR_TRY(choir_tokenizer_add_decode(t, CHOIR_DECODE_REPLACE, &stage));
    CHOIR_TRY(make_text(" ", &stage->content, &stage->content_bytes));
    CHOIR_TRY(choir_pattern_compile("marks", "\xE2\x96\x81", 3, true, &stage->pattern));
    CHOIR_TRY(choir_tokenizer_add_decode(t, CHOIR_DECODE_BYTE_FALLBACK, &stage));
    CHOIR_TRY(choir_tokenizer_add_decode(t, CHOIR_DECODE_FUSE, &stage));
    if (!prefix) return CHOIR_OK;
    CHOIR_TRY(choir_tokenizer_add_decode(t, CHOIR_DECODE_STRIP, &stage));
    stage->mark[0] = ' ';
    stage->mark_bytes = 1;
    stage->start = 1;
    return CHOIR_OK;
}

/* ---- byte-level BPE */
static choir_status find_pre(const reader *r, const pre_tokenizer **out)
{
    static const char key[] = KEY("pre");
    choir_text name = {"default", 7};
    char spaced[80], known[1500];
    size_t n = 0;
    choir_gguf_string(r->gguf, key, &name);
    if (name.bytes < sizeof spaced - 3 && memchr(name.data, ' ', name.bytes) == NULL) {
        snprintf(spaced, sizeof spaced, " %.*s ", (int)name.bytes, name.data);
        for (size_t i = 0; i < sizeof pre_tokenizers / sizeof pre_tokenizers[0]; i++)
            if (strstr(pre_tokenizers[i].names, spaced) != NULL) {
                *out = &pre_tokenizers[i];
                return CHOIR_OK;
            }
    }
    for (size_t i = 0; i < sizeof pre_tokenizers / sizeof pre_tokenizers[0]; i++)
        n += (size_t)snprintf(known + n, sizeof known - n, "%s", pre_tokenizers[i].names + 1);
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "GGUF metadata %s: the pre-tokenizer \"%.*s\" is not known; known are %s",
                      key, (int)(name.bytes < 60 ? name.bytes : 60), name.data, known);
}

static choir_status read_merges(reader *r)
{
    const choir_gguf_array *merges = choir_gguf_find_array(r->gguf, KEY("merges"));
    if (merges == NULL) return bad(KEY("merges"), "an array of strings is wanted");
    uint64_t n = choir_gguf_array_count(merges);
    CHOIR_TRY(choir_bpe_create(&r->t->bpe, &r->t->vocab, (size_t)n));
    for (uint64_t i = 0; i < n; i++) {
        choir_text merge;
        if (!choir_gguf_array_string(merges, i, &merge))
            return bad(KEY("merges"), "an array of strings is wanted");
        const char *space = merge.bytes < 3 ? NULL : memchr(merge.data + 1, ' ', merge.bytes - 2);
        if (space == NULL)
            return choir_fail(CHOIR_E_FORMAT,
                              "GGUF metadata " KEY("merges") "[%llu] is no pair of tokens",
                              (unsigned long long)i);
        size_t left = (size_t)(space - merge.data);
        choir_status status = choir_bpe_add_merge(&r->t->bpe, &r->t->vocab, (uint32_t)i, merge.data,
                                                  left, space + 1, merge.bytes - left - 1);
        if (status != CHOIR_OK) return choir_fail_in(status, "GGUF metadata " KEY("merges"));
    }
    return CHOIR_OK;
}

static choir_status read_bpe(reader *r)
{
    choir_tokenizer *t = r->t;
    const pre_tokenizer *pre = NULL;
    choir_normal_step *normal;
    choir_split_step *split;
    choir_decode_stage *stage;
    CHOIR_TRY(find_pre(r, &pre));
    CHOIR_TRY(read_merges(r));
    t->bpe.ignore_merges = pre->ignore_merges;
    if (pre->nfc) CHOIR_TRY(choir_tokenizer_add_normal(t, CHOIR_NORMAL_NFC, &normal));
    for (size_t i = 0; i < 6 && pre->patterns[i] != NULL; i++) {
        CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_PATTERN, &split));
        CHOIR_TRY(choir_pattern_compile(KEY("pre"), pre->patterns[i], strlen(pre->patterns[i]),
                                        false, &split->pattern));
    }
    if (pre->characters) {
        t->kind = "BPE with byte fallback";
        t->bpe.byte_fallback = true;
        CHOIR_TRY(mark_spaces(t, flag(r, KEY("add_space_prefix"), false)));
        CHOIR_TRY(unmark_spaces(t, flag(r, KEY("add_space_prefix"), false)));
    } else {
        t->kind = "byte-level BPE";
        if (flag(r, KEY("add_space_prefix"), false)) {
            CHOIR_TRY(
                choir_tokenizer_add_normal(t, CHOIR_NORMAL_PREPEND, &(choir_normal_step *){NULL}));
            choir_normal_step *step = &t->normal[t->n_normal - 1];
            CHOIR_TRY(make_text(" ", &step->content, &step->content_bytes));
        }
        CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_BYTES, &split));
        CHOIR_TRY(choir_tokenizer_add_decode(t, CHOIR_DECODE_BYTE_LEVEL, &stage));
    }
    return read_special(r, pre->add_bos);
}

/* ---- SentencePiece */
typedef struct scored {
    double score;
    uint32_t id;
} scored;

static int best_first(const void *a, const void *b)
{
    double x = ((const scored *)a)->score, y = ((const scored *)b)->score;
    return x > y ? -1 : x < y;
}

/* Scores as ranks: the order of merges needs no more, and equal scores stay equal. */
static choir_status rank_scores(reader *r)
{
    choir_bpe *bpe = &r->t->bpe;
    const choir_gguf_array *scores = choir_gguf_find_array(r->gguf, KEY("scores"));
    if (scores == NULL || choir_gguf_array_count(scores) != r->n)
        return bad(KEY("scores"), "an array as long as tokenizer.ggml.tokens is wanted");
    bpe->score_rank = choir_alloc(CHOIR_MEM_TOKENIZER, (size_t)r->n * sizeof *bpe->score_rank);
    bpe->mergeable = choir_alloc(CHOIR_MEM_TOKENIZER, r->n);
    scored *order = choir_alloc(CHOIR_MEM_TOKENIZER, (size_t)r->n * sizeof *order);
    choir_status status = CHOIR_OK;
    if (bpe->score_rank == NULL || bpe->mergeable == NULL || order == NULL)
        status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for the scores of %u tokens", r->n);
    for (uint32_t i = 0; status == CHOIR_OK && i < r->n; i++) {
        int64_t type = type_of(r, i);
        bool mergeable = type == TYPE_NORMAL || type == TYPE_USER_DEFINED;
        bpe->mergeable[i] = mergeable             ? CHOIR_MERGEABLE
                            : type == TYPE_UNUSED ? CHOIR_MERGEABLE_UNUSED
                                                  : CHOIR_MERGEABLE_NEVER;
        order[i].id = i;
        if (!choir_gguf_array_real(scores, i, &order[i].score) || isnan(order[i].score))
            status =
                choir_fail(CHOIR_E_FORMAT, "GGUF metadata " KEY("scores") "[%u] is no number", i);
    }
    if (status == CHOIR_OK) {
        qsort(order, r->n, sizeof *order, best_first);
        uint32_t rank = 0;
        for (uint32_t i = 0; i < r->n; i++) {
            if (i > 0 && order[i].score != order[i - 1].score) rank++;
            bpe->score_rank[order[i].id] = rank;
        }
    }
    choir_free(order);
    return status;
}

static choir_status read_sentencepiece(reader *r)
{
    choir_tokenizer *t = r->t;
    int32_t unknown;
    bool prefix = flag(r, KEY("add_space_prefix"), true);
    CHOIR_TRY(choir_bpe_create(&t->bpe, &t->vocab, 0));
    CHOIR_TRY(rank_scores(r));
    CHOIR_TRY(read_id(r, KEY("unknown_token_id"), &unknown));
    if (unknown >= 0) t->bpe.unknown_id = (uint32_t)unknown;
    t->bpe.byte_fallback = true;
    t->kind = "SentencePiece BPE";
    if (flag(r, KEY("remove_extra_whitespaces"), false)) {
        choir_normal_step *step;
        CHOIR_TRY(choir_tokenizer_add_normal(t, CHOIR_NORMAL_COLLAPSE_SPACES, &step));
    }
    CHOIR_TRY(mark_spaces(t, prefix));
    CHOIR_TRY(unmark_spaces(t, prefix));
    return read_special(r, true);
}

static choir_status read_all(reader *r)
{
    choir_text model = {"", 0};
    choir_gguf_string(r->gguf, KEY("model"), &model);
    bool bpe = model.bytes == 4 && memcmp(model.data, "gpt2", 4) == 0;
    bool sentencepiece = model.bytes == 5 && memcmp(model.data, "llama", 5) == 0;
    if (!bpe && !sentencepiece)
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "GGUF metadata " KEY("model") " is \"%.*s\"; known are gpt2 (byte-level BPE) and "
                                          "llama (SentencePiece BPE)",
            (int)(model.bytes < 40 ? model.bytes : 40), model.data);
    CHOIR_TRY(read_tokens(r));
    CHOIR_TRY(bpe ? read_bpe(r) : read_sentencepiece(r));
    return choir_tokenizer_finish(r->t);
}

choir_status choir_tokenizer_parse_gguf(const choir_gguf *gguf, choir_tokenizer **out)
{
    reader r = {.gguf = gguf};
    CHOIR_TRY(choir_tokenizer_new(&r.t));
    choir_status status = read_all(&r);
    if (status == CHOIR_OK) {
        *out = r.t;
        return CHOIR_OK;
    }
    choir_tokenizer_destroy(r.t);
    return status;
}
