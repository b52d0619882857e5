/* Text to ids, as it reads: added tokens are taken out of the text; what lies between them is
 * normalised, once more searched for added tokens, cut into words; the words become ids. */
#include "engine/tokenizer_internal.h"

#include "base/file.h"
#include "engine/gguf.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

enum { MAX_TEXT = 1 << 30, MAX_FILE = 1 << 30 };

choir_status choir_text_too_long(size_t bytes)
{
    return choir_fail(CHOIR_E_INVALID,
                      "the tokenizer's steps make %zu bytes of this text: that is beyond any use",
                      bytes);
}

/* ---- encoding */
typedef struct encoder {
    const choir_tokenizer *t;
    choir_match match;
    choir_spans spans, inner_spans;
    choir_bytes normal[2];
    choir_split_scratch split;
    choir_bpe_scratch bpe;
    choir_ids out;
} encoder;

static void encoder_free(encoder *e)
{
    choir_match_free(&e->match);
    choir_free(e->spans.data);
    choir_free(e->inner_spans.data);
    for (int i = 0; i < 2; i++) {
        choir_free(e->normal[i].data);
        choir_free(e->split.buffers[i].data);
        choir_free(e->split.pieces[i].data);
    }
    choir_bpe_scratch_free(&e->bpe);
    choir_free(e->out.data);
}

/* Text without added tokens: words, and their ids. */
static choir_status encode_plain(encoder *e, const char *text, size_t bytes, bool first)
{
    const choir_tokenizer *t = e->t;
    const char *words;
    const choir_pieces *pieces;
    CHOIR_TRY(choir_split(t->split, t->n_split, text, bytes, first, &e->split, &e->match, &words,
                          &pieces));
    for (size_t i = 0; i < pieces->n; i++) {
        choir_piece p = pieces->data[i];
        CHOIR_TRY(choir_bpe_encode(&t->bpe, &t->vocab, words + p.begin, p.end - p.begin,
                                   t->raw_bytes, &e->bpe, &e->out));
    }
    return CHOIR_OK;
}

/* Text between added tokens as they are written: normalised, it may hold others. */
static choir_status encode_between(encoder *e, const char *text, size_t bytes, bool first,
                                   bool parse_special)
{
    const choir_tokenizer *t = e->t;
    CHOIR_TRY(
        choir_normalize(t->normal, t->n_normal, text, bytes, e->normal, &e->match, &text, &bytes));
    if (!t->normal_trie.any) return encode_plain(e, text, bytes, first);
    e->inner_spans.n = 0;
    CHOIR_TRY(
        choir_added_find(&t->normal_trie, t->added, text, bytes, parse_special, &e->inner_spans));
    for (size_t i = 0; i < e->inner_spans.n; i++) {
        choir_span s = e->inner_spans.data[i];
        if (s.token != CHOIR_NO_ID)
            CHOIR_TRY(choir_ids_push(&e->out, t->added[s.token].id));
        else
            CHOIR_TRY(encode_plain(e, text + s.begin, s.end - s.begin, first && s.begin == 0));
    }
    return CHOIR_OK;
}

static choir_status encode_text(encoder *e, const char *text, size_t bytes, bool parse_special)
{
    const choir_tokenizer *t = e->t;
    if (!t->trie.any) return encode_between(e, text, bytes, true, parse_special);
    CHOIR_TRY(choir_added_find(&t->trie, t->added, text, bytes, parse_special, &e->spans));
    for (size_t i = 0; i < e->spans.n; i++) {
        choir_span s = e->spans.data[i];
        if (s.token != CHOIR_NO_ID)
            CHOIR_TRY(choir_ids_push(&e->out, t->added[s.token].id));
        else
            CHOIR_TRY(
                encode_between(e, text + s.begin, s.end - s.begin, s.begin == 0, parse_special));
    }
    return CHOIR_OK;
}

static choir_status encode_with_post(encoder *e, const char *text, size_t bytes,
                                     choir_encode_options options)
{
    const choir_tokenizer *t = e->t;
    for (size_t i = 0; i < t->n_post; i++) {
        if (t->post[i] == CHOIR_POST_TEXT)
            CHOIR_TRY(encode_text(e, text, bytes, options.parse_special));
        else if (options.add_special)
            CHOIR_TRY(choir_ids_push(&e->out, (uint32_t)t->post[i]));
    }
    return CHOIR_OK;
}

choir_status choir_tokenizer_encode(const choir_tokenizer *tokenizer, const char *text,
                                    size_t bytes, choir_encode_options options, uint32_t **ids,
                                    size_t *n_ids)
{
    if (bytes > MAX_TEXT)
        return choir_fail(CHOIR_E_INVALID, "a text of %zu bytes; the tokenizer takes up to %d",
                          bytes, MAX_TEXT);
    size_t valid = choir_utf8_check(text, bytes);
    if (valid != bytes)
        return choir_fail(CHOIR_E_INVALID, "the text is not valid UTF-8 at byte %zu (0x%02x)",
                          valid, (uint8_t)text[valid]);
    encoder e = {.t = tokenizer};
    choir_match_allow(&e.match, bytes);
    choir_status status = encode_with_post(&e, text, bytes, options);
    if (status == CHOIR_OK && e.out.data == NULL) /* no ids are still an array */
        status = choir_buffer_grow((void **)&e.out.data, 0, &e.out.capacity, 1, sizeof(uint32_t));
    if (status == CHOIR_OK) {
        *ids = e.out.data;
        *n_ids = e.out.n;
        e.out = (choir_ids){0};
    }
    encoder_free(&e);
    return status;
}

/* ---- what a tokenizer is made of */
choir_status choir_tokenizer_new(choir_tokenizer **out)
{
    choir_tokenizer *t = choir_calloc(CHOIR_MEM_TOKENIZER, 1, sizeof *t);
    if (t == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a tokenizer");
    t->bos = t->eos = -1;
    t->bpe.unknown_id = CHOIR_NO_ID;
    t->kind = "";
    *out = t;
    return CHOIR_OK;
}

void choir_tokenizer_destroy(choir_tokenizer *t)
{
    if (t == NULL) return;
    for (size_t i = 0; i < t->n_normal; i++) {
        choir_pattern_destroy(t->normal[i].pattern);
        choir_free(t->normal[i].content);
    }
    for (size_t i = 0; i < t->n_split; i++) choir_pattern_destroy(t->split[i].pattern);
    for (size_t i = 0; i < t->n_decode; i++) {
        choir_pattern_destroy(t->decode[i].pattern);
        choir_free(t->decode[i].content);
    }
    for (size_t i = 0; i < t->n_added; i++) choir_free(t->added[i].normal);
    choir_free(t->added);
    choir_added_destroy(&t->trie);
    choir_added_destroy(&t->normal_trie);
    choir_free(t->post);
    choir_bpe_destroy(&t->bpe);
    choir_vocab_destroy(&t->vocab);
    choir_free(t);
}

static choir_status too_many(const char *what)
{
    return choir_fail(CHOIR_E_FORMAT, "more than %d steps in the tokenizer's %s",
                      CHOIR_TOKENIZER_MAX_STEPS, what);
}

choir_status choir_tokenizer_add_normal(choir_tokenizer *t, choir_normal_kind kind,
                                        choir_normal_step **out)
{
    if (t->n_normal == CHOIR_TOKENIZER_MAX_STEPS) return too_many("normalizer");
    *out = &t->normal[t->n_normal++];
    (*out)->kind = kind;
    return CHOIR_OK;
}

choir_status choir_tokenizer_add_split(choir_tokenizer *t, choir_split_kind kind,
                                       choir_split_step **out)
{
    if (t->n_split == CHOIR_TOKENIZER_MAX_STEPS) return too_many("pre_tokenizer");
    *out = &t->split[t->n_split++];
    (*out)->kind = kind;
    return CHOIR_OK;
}

choir_status choir_tokenizer_add_decode(choir_tokenizer *t, choir_decode_kind kind,
                                        choir_decode_stage **out)
{
    if (t->n_decode == CHOIR_TOKENIZER_MAX_STEPS) return too_many("decoder");
    *out = &t->decode[t->n_decode++];
    (*out)->kind = kind;
    return CHOIR_OK;
}

choir_status choir_tokenizer_add_post(choir_tokenizer *t, int64_t item)
{
    if (t->n_post == t->post_capacity)
        CHOIR_TRY(
            choir_buffer_grow((void **)&t->post, t->n_post, &t->post_capacity, 1, sizeof item));
    t->post[t->n_post++] = item;
    return CHOIR_OK;
}

choir_status choir_tokenizer_add_token(choir_tokenizer *t, const char *content, size_t bytes,
                                       choir_added_token token)
{
    if (bytes == 0) return CHOIR_OK;
    if (bytes > CHOIR_MAX_ADDED)
        return choir_fail(CHOIR_E_FORMAT, "an added token of %zu bytes (\"%.60s…\"); the limit is %d",
                          bytes, content, CHOIR_MAX_ADDED);
    token.id = choir_vocab_find(&t->vocab, content, bytes);
    token.normal = NULL;
    if (token.id == CHOIR_NO_ID) {
        token.id = t->vocab.n_ids;
        CHOIR_TRY(choir_vocab_add(&t->vocab, token.id, content, bytes));
    }
    if (t->n_added == t->added_capacity)
        CHOIR_TRY(choir_buffer_grow((void **)&t->added, t->n_added, &t->added_capacity, 1,
                                    sizeof *t->added));
    t->added[t->n_added++] = token;
    return CHOIR_OK;
}

static int order_by_id(const void *a, const void *b)
{
    uint32_t x = ((const choir_added_token *)a)->id, y = ((const choir_added_token *)b)->id;
    return x < y ? -1 : x > y;
}

/* The last of several entries with one id counts, as in the reference; the order of the file is
 * that of `normal`, which is not in use yet. */
static void sort_added(choir_tokenizer *t)
{
    if (t->n_added == 0) return;
    size_t n = 0;
    for (size_t i = 0; i < t->n_added; i++) t->added[i].normal_bytes = i;
    qsort(t->added, t->n_added, sizeof *t->added, order_by_id);
    for (size_t i = 0; i < t->n_added; i++) {
        if (n > 0 && t->added[n - 1].id == t->added[i].id) {
            bool special = t->added[n - 1].special || t->added[i].special;
            if (t->added[i].normal_bytes > t->added[n - 1].normal_bytes)
                t->added[n - 1] = t->added[i];
            t->vocab.flags[t->added[i].id] |= special ? CHOIR_ID_SPECIAL : 0;
        } else {
            t->added[n++] = t->added[i];
        }
    }
    t->n_added = n;
    for (size_t i = 0; i < n; i++) t->added[i].normal_bytes = 0;
}

static choir_status normalise_added(choir_tokenizer *t, choir_added_token *a)
{
    if (!a->normalized || t->n_normal == 0) return CHOIR_OK;
    const char *content = t->vocab.text.data + t->vocab.offset[a->id], *normal;
    size_t bytes = t->vocab.length[a->id], normal_bytes;
    choir_bytes buffers[2] = {0};
    choir_match match = {0};
    choir_match_allow(&match, bytes);
    choir_status status = choir_normalize(t->normal, t->n_normal, content, bytes, buffers, &match,
                                          &normal, &normal_bytes);
    if (status == CHOIR_OK && (normal_bytes != bytes || memcmp(normal, content, bytes) != 0)) {
        a->normal = choir_alloc(CHOIR_MEM_TOKENIZER, normal_bytes + 1);
        if (a->normal == NULL)
            status = choir_fail(CHOIR_E_NO_MEMORY, "no memory for an added token");
        else
            memcpy(a->normal, normal, normal_bytes);
        a->normal_bytes = normal_bytes;
        t->vocab.flags[a->id] |= CHOIR_ID_NORMAL;
    }
    choir_match_free(&match);
    choir_free(buffers[0].data);
    choir_free(buffers[1].data);
    return status;
}

static choir_status index_added(choir_tokenizer *t)
{
    sort_added(t);
    for (size_t i = 0; i < t->n_added; i++) {
        choir_added_token *a = &t->added[i];
        if (a->special) t->vocab.flags[a->id] |= CHOIR_ID_SPECIAL;
        if (t->vocab.flags[a->id] & CHOIR_ID_SPECIAL) {
            a->special = true;
            t->vocab.flags[a->id] |= CHOIR_ID_SKIPPED;
        }
        CHOIR_TRY(normalise_added(t, a));
        const char *text = t->vocab.text.data + t->vocab.offset[a->id];
        size_t bytes = t->vocab.length[a->id];
        if (a->normal != NULL) {
            text = a->normal;
            bytes = a->normal_bytes;
        }
        CHOIR_TRY(choir_added_insert(a->normalized ? &t->normal_trie : &t->trie, text, bytes,
                                     (uint32_t)i));
    }
    /* What is decoded is skipped if it is itself a special token's content. */
    for (size_t i = 0; i < t->n_added; i++) {
        const choir_added_token *a = &t->added[i];
        if (a->normal == NULL) continue;
        uint32_t same = choir_vocab_find(&t->vocab, a->normal, a->normal_bytes);
        bool skipped = same != CHOIR_NO_ID && (t->vocab.flags[same] & CHOIR_ID_SPECIAL);
        if (!skipped) t->vocab.flags[a->id] &= (uint8_t)~CHOIR_ID_SKIPPED;
    }
    return CHOIR_OK;
}

choir_status choir_tokenizer_finish(choir_tokenizer *t)
{
    CHOIR_TRY(index_added(t));
    /* A last step that only writes bytes as characters is left to the model's byte table. */
    if (t->n_split > 0 && t->split[t->n_split - 1].kind == CHOIR_SPLIT_BYTES && t->bpe.all_bytes &&
        t->bpe.score_rank == NULL) {
        t->raw_bytes = true;
        t->n_split--;
    }
    bool fused = false;
    for (size_t i = 0; i < t->n_decode; i++) {
        choir_decode_stage *s = &t->decode[i];
        s->fused = fused;
        s->whole =
            fused && (s->kind == CHOIR_DECODE_BYTE_FALLBACK || s->kind == CHOIR_DECODE_BYTE_LEVEL ||
                      (s->kind == CHOIR_DECODE_STRIP && s->stop > 0) ||
                      (s->kind == CHOIR_DECODE_REPLACE && !choir_pattern_is_character(s->pattern)));
        fused = fused || s->kind == CHOIR_DECODE_FUSE || s->kind == CHOIR_DECODE_BYTE_LEVEL;
    }
    if (t->n_decode == 0) {
        choir_decode_stage *join;
        CHOIR_TRY(choir_tokenizer_add_decode(t, CHOIR_DECODE_JOIN_SPACES, &join));
    }
    return CHOIR_OK;
}

/* ---- questions */
uint32_t choir_tokenizer_n_ids(const choir_tokenizer *t)
{
    return t->vocab.n_ids;
}

bool choir_tokenizer_is_special(const choir_tokenizer *t, uint32_t id)
{
    return id < t->vocab.n_ids && (t->vocab.flags[id] & CHOIR_ID_SPECIAL);
}

const char *choir_tokenizer_piece(const choir_tokenizer *t, uint32_t id, size_t *bytes)
{
    if (!choir_vocab_has(&t->vocab, id)) return NULL;
    *bytes = t->vocab.length[id];
    return t->vocab.text.data + t->vocab.offset[id];
}

bool choir_tokenizer_find(const choir_tokenizer *t, const char *piece, size_t bytes, uint32_t *id)
{
    uint32_t found = choir_vocab_find(&t->vocab, piece, bytes);
    if (found == CHOIR_NO_ID) return false;
    *id = found;
    return true;
}

int32_t choir_tokenizer_bos(const choir_tokenizer *t)
{
    return t->bos;
}

int32_t choir_tokenizer_eos(const choir_tokenizer *t)
{
    return t->eos;
}

const char *choir_tokenizer_kind(const choir_tokenizer *t)
{
    return t->kind;
}

/* ---- opening a model's own */
choir_status choir_tokenizer_open(const choir_model_file *file, choir_tokenizer **out)
{
    const choir_gguf *gguf = choir_model_file_gguf(file);
    if (gguf != NULL) return choir_tokenizer_parse_gguf(gguf, out);
    char *json, *config = NULL;
    size_t bytes, config_bytes = 0;
    static const char *const config_name = "tokenizer_config.json";
    CHOIR_TRY(choir_model_file_text(file, "tokenizer.json", MAX_FILE, &json, &bytes));
    choir_status status = CHOIR_OK;
    if (choir_model_file_has_text(file, config_name))
        status = choir_model_file_text(file, config_name, MAX_FILE, &config, &config_bytes);
    if (status == CHOIR_OK) status = choir_tokenizer_parse_json(json, bytes, out);
    if (status == CHOIR_OK && config != NULL) {
        status = choir_tokenizer_read_config(*out, config, config_bytes);
        if (status != CHOIR_OK) choir_tokenizer_destroy(*out);
    }
    choir_free(json);
    choir_free(config);
    return status == CHOIR_OK ? status : choir_fail_in(status, "%s", choir_model_file_path(file));
}
