/* tokenizer.json: which parts it names, and what each becomes here. A field that changes ids and is
 * not known is refused by name; nothing is ignored silently but what cannot change ids (truncation,
 * padding). */
#include "engine/tokenizer_internal.h"

#include <jansson.h>
#include <stdio.h>

typedef choir_status (*read_part)(choir_tokenizer *t, const json_t *part, const char *where,
                                  uint32_t depth);

static choir_status bad(const char *where, const char *field, const char *want)
{
    return choir_fail(CHOIR_E_FORMAT, "tokenizer.json: %s.%s: %s", where, field, want);
}

static choir_status unknown_type(const char *where, const char *type, const char *known)
{
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "tokenizer.json: %s of type \"%.60s\" is not supported (%s)", where, type,
                      known);
}

static choir_status get_bool(const json_t *part, const char *where, const char *field, bool missing,
                             bool *out)
{
    const json_t *value = json_object_get(part, field);
    *out = missing;
    if (value == NULL || json_is_null(value)) return CHOIR_OK;
    if (!json_is_boolean(value)) return bad(where, field, "a bool is wanted");
    *out = json_is_true(value);
    return CHOIR_OK;
}

static choir_status get_count(const json_t *part, const char *where, const char *field,
                              uint32_t missing, uint32_t *out)
{
    const json_t *value = json_object_get(part, field);
    *out = missing;
    if (value == NULL) return CHOIR_OK;
    if (!json_is_integer(value) || json_integer_value(value) < 0 ||
        json_integer_value(value) > 1 << 20)
        return bad(where, field, "a count up to 1048576 is wanted");
    *out = (uint32_t)json_integer_value(value);
    return CHOIR_OK;
}

static choir_status get_text(const json_t *part, const char *where, const char *field,
                             const char **out, size_t *bytes)
{
    const json_t *value = json_object_get(part, field);
    if (!json_is_string(value)) return bad(where, field, "a string is wanted");
    *out = json_string_value(value);
    *bytes = json_string_length(value);
    return CHOIR_OK;
}

static choir_status get_character(const json_t *part, const char *where, const char *field,
                                  uint32_t *out)
{
    const char *text;
    size_t bytes, at = 0;
    CHOIR_TRY(get_text(part, where, field, &text, &bytes));
    if (bytes == 0 || choir_utf8_length((uint8_t)text[0]) != bytes)
        return bad(where, field, "one character is wanted");
    *out = choir_utf8_next(text, &at);
    return CHOIR_OK;
}

/* Text that a step inserts: kept short, so that no file can blow up a text. */
static choir_status get_content(const json_t *part, const char *where, const char *field,
                                char **out, size_t *out_bytes)
{
    const char *text;
    size_t bytes;
    CHOIR_TRY(get_text(part, where, field, &text, &bytes));
    if (bytes > CHOIR_MAX_CONTENT)
        return choir_fail(CHOIR_E_FORMAT, "tokenizer.json: %s.%s has %zu bytes; the limit is %d",
                          where, field, bytes, CHOIR_MAX_CONTENT);
    *out = choir_alloc(CHOIR_MEM_TOKENIZER, bytes + 1);
    if (*out == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a tokenizer");
    memcpy(*out, text, bytes + 1);
    *out_bytes = bytes;
    return CHOIR_OK;
}

/* {"String": …} or {"Regex": …} */
static choir_status get_pattern(const json_t *part, const char *where, choir_pattern **out)
{
    const json_t *pattern = json_object_get(part, "pattern");
    const json_t *literal = json_object_get(pattern, "String");
    const json_t *regex = json_object_get(pattern, "Regex");
    const json_t *text = literal != NULL ? literal : regex;
    if (!json_is_string(text))
        return bad(where, "pattern", "{\"String\": …} or {\"Regex\": …} is wanted");
    return choir_pattern_compile(where, json_string_value(text), json_string_length(text),
                                 literal != NULL, out);
}

/* A part is absent, one of a type, or a Sequence of parts. */
static choir_status read_parts(choir_tokenizer *t, const json_t *part, const char *where,
                               const char *list, uint32_t depth, read_part read)
{
    if (part == NULL || json_is_null(part)) return CHOIR_OK;
    const char *type = json_string_value(json_object_get(part, "type"));
    if (type == NULL) return bad(where, "type", "a string is wanted");
    if (strcmp(type, "Sequence") != 0) return read(t, part, where, depth);
    const json_t *parts = json_object_get(part, list);
    if (!json_is_array(parts)) return bad(where, list, "an array is wanted");
    if (depth > 8) return bad(where, list, "Sequences are nested deeper than 8");
    size_t i;
    json_t *one;
    json_array_foreach(parts, i, one)
    {
        char name[160];
        snprintf(name, sizeof name, "%.100s.%s[%zu]", where, list, i);
        CHOIR_TRY(read_parts(t, one, name, list, depth + 1, read));
    }
    return CHOIR_OK;
}

/* ---- normalizers */
static choir_status read_normalizer(choir_tokenizer *t, const json_t *part, const char *where,
                                    uint32_t depth)
{
    static const struct {
        const char *type;
        choir_normal_kind kind;
    } kinds[] = {
        {"NFC", CHOIR_NORMAL_NFC},
        {"NFD", CHOIR_NORMAL_NFD},
        {"NFKC", CHOIR_NORMAL_NFKC},
        {"NFKD", CHOIR_NORMAL_NFKD},
        {"Lowercase", CHOIR_NORMAL_LOWERCASE},
        {"Strip", CHOIR_NORMAL_STRIP},
        {"StripAccents", CHOIR_NORMAL_STRIP_ACCENTS},
        {"Prepend", CHOIR_NORMAL_PREPEND},
        {"Replace", CHOIR_NORMAL_REPLACE},
        {"ByteLevel", CHOIR_NORMAL_BYTE_LEVEL},
        {"Nmt", CHOIR_NORMAL_NMT},
    };
    const char *type = json_string_value(json_object_get(part, "type"));
    (void)depth;
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (strcmp(type, kinds[i].type) != 0) continue;
        choir_normal_step *step;
        CHOIR_TRY(choir_tokenizer_add_normal(t, kinds[i].kind, &step));
        if (step->kind == CHOIR_NORMAL_STRIP) {
            CHOIR_TRY(get_bool(part, where, "strip_left", false, &step->left));
            CHOIR_TRY(get_bool(part, where, "strip_right", false, &step->right));
        }
        if (step->kind == CHOIR_NORMAL_PREPEND)
            CHOIR_TRY(get_content(part, where, "prepend", &step->content, &step->content_bytes));
        if (step->kind == CHOIR_NORMAL_REPLACE) {
            CHOIR_TRY(get_content(part, where, "content", &step->content, &step->content_bytes));
            CHOIR_TRY(get_pattern(part, where, &step->pattern));
        }
        return CHOIR_OK;
    }
    return unknown_type(
        where, type,
        "known: NFC, NFD, NFKC, NFKD, Lowercase, Strip, StripAccents, Prepend, Replace, "
        "ByteLevel, Nmt, Sequence");
}

/* ---- pre-tokenizers */
static choir_status read_behaviour(const json_t *part, const char *where, const char *missing,
                                   choir_split_behaviour *out)
{
    static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious",
                                        "MergedWithNext", "Contiguous"};
    const json_t *value = json_object_get(part, "behavior");
    const char *name = value == NULL ? missing : json_string_value(value);
    for (size_t i = 0; name != NULL && i < 5; i++)
        if (strcmp(name, names[i]) == 0) {
            *out = (choir_split_behaviour)i;
            return CHOIR_OK;
        }
    return bad(where, "behavior",
               "Isolated, Removed, MergedWithPrevious, MergedWithNext or Contiguous is wanted");
}

static const char gpt2_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

static choir_status read_byte_level(choir_tokenizer *t, const json_t *part, const char *where)
{
    bool prefix, regex;
    choir_split_step *step;
    CHOIR_TRY(get_bool(part, where, "add_prefix_space", true, &prefix));
    CHOIR_TRY(get_bool(part, where, "use_regex", true, &regex));
    if (prefix) CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_PREFIX_SPACE, &step));
    if (regex) {
        CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_PATTERN, &step));
        CHOIR_TRY(choir_pattern_compile(where, gpt2_pattern, strlen(gpt2_pattern), false,
                                        &step->pattern));
    }
    return choir_tokenizer_add_split(t, CHOIR_SPLIT_BYTES, &step);
}

static choir_status read_prepend(const json_t *part, const char *where, choir_prepend *out)
{
    static const char *const names[] = {"always", "first", "never"};
    const json_t *value = json_object_get(part, "prepend_scheme");
    const char *name = value == NULL ? "always" : json_string_value(value);
    int scheme = -1;
    bool prefix;
    CHOIR_TRY(get_bool(part, where, "add_prefix_space", true, &prefix));
    for (int i = 0; name != NULL && i < 3; i++)
        if (strcmp(name, names[i]) == 0) scheme = i;
    if (scheme < 0) return bad(where, "prepend_scheme", "always, first or never is wanted");
    *out = (choir_prepend)scheme;
    if (!prefix && *out != CHOIR_PREPEND_NEVER && value != NULL)
        return bad(where, "add_prefix_space", "it contradicts prepend_scheme");
    if (!prefix) *out = CHOIR_PREPEND_NEVER;
    return CHOIR_OK;
}

static choir_status read_metaspace(choir_tokenizer *t, const json_t *part, const char *where)
{
    choir_split_step *step;
    bool split;
    CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_METASPACE, &step));
    CHOIR_TRY(get_character(part, where, "replacement", &step->character));
    CHOIR_TRY(read_prepend(part, where, &step->prepend));
    CHOIR_TRY(get_bool(part, where, "split", true, &split));
    if (!split) return CHOIR_OK;
    uint32_t mark = step->character;
    CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_CHARACTER, &step));
    step->character = mark;
    step->behaviour = CHOIR_SPLIT_MERGED_WITH_NEXT;
    return CHOIR_OK;
}

static choir_status read_split(choir_tokenizer *t, const json_t *part, const char *where)
{
    choir_split_step *step;
    CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_PATTERN, &step));
    CHOIR_TRY(get_pattern(part, where, &step->pattern));
    CHOIR_TRY(read_behaviour(part, where, NULL, &step->behaviour));
    return get_bool(part, where, "invert", false, &step->invert);
}

static choir_status read_class(choir_tokenizer *t, const json_t *part, const char *where,
                               const char *type)
{
    choir_split_step *step;
    if (strcmp(type, "Digits") == 0) {
        bool individual;
        CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_NUMERIC, &step));
        CHOIR_TRY(get_bool(part, where, "individual_digits", false, &individual));
        step->behaviour = individual ? CHOIR_SPLIT_ISOLATED : CHOIR_SPLIT_CONTIGUOUS;
        return CHOIR_OK;
    }
    if (strcmp(type, "Punctuation") == 0) {
        CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_PUNCTUATION, &step));
        return read_behaviour(part, where, "Isolated", &step->behaviour);
    }
    if (strcmp(type, "CharDelimiterSplit") == 0) {
        CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_CHARACTER, &step));
        step->behaviour = CHOIR_SPLIT_REMOVED;
        return get_character(part, where, "delimiter", &step->character);
    }
    /* WhitespaceSplit and BertPreTokenizer cut at spaces; the latter at punctuation too. */
    CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_SPACE, &step));
    step->behaviour = CHOIR_SPLIT_REMOVED;
    if (strcmp(type, "WhitespaceSplit") == 0) return CHOIR_OK;
    CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_PUNCTUATION, &step));
    step->behaviour = CHOIR_SPLIT_ISOLATED;
    return CHOIR_OK;
}

static choir_status read_pre_tokenizer(choir_tokenizer *t, const json_t *part, const char *where,
                                       uint32_t depth)
{
    const char *type = json_string_value(json_object_get(part, "type"));
    choir_split_step *step;
    (void)depth;
    if (strcmp(type, "ByteLevel") == 0) return read_byte_level(t, part, where);
    if (strcmp(type, "Metaspace") == 0) return read_metaspace(t, part, where);
    if (strcmp(type, "Split") == 0) return read_split(t, part, where);
    if (strcmp(type, "Digits") == 0 || strcmp(type, "Punctuation") == 0 ||
        strcmp(type, "WhitespaceSplit") == 0 || strcmp(type, "BertPreTokenizer") == 0 ||
        strcmp(type, "CharDelimiterSplit") == 0)
        return read_class(t, part, where, type);
    if (strcmp(type, "Whitespace") == 0) {
        /* Rust's \w, unlike Oniguruma's: no superscripts, but the two joiners. */
        static const char words[] =
            "[\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{200c}\\x{200d}\\x{24b6}-\\x{24e9}\\x{1f130}-"
            "\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}]+|"
            "[^\\s\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{200c}\\x{200d}\\x{24b6}-\\x{24e9}\\x{1f130}-"
            "\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}]+";
        CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_PATTERN, &step));
        step->behaviour = CHOIR_SPLIT_REMOVED;
        step->invert = true;
        return choir_pattern_compile(where, words, strlen(words), false, &step->pattern);
    }
    if (strcmp(type, "FixedLength") == 0) {
        CHOIR_TRY(choir_tokenizer_add_split(t, CHOIR_SPLIT_FIXED, &step));
        CHOIR_TRY(get_count(part, where, "length", 5, &step->length));
        return step->length > 0 ? CHOIR_OK : bad(where, "length", "at least 1 is wanted");
    }
    return unknown_type(
        where, type,
        "known: ByteLevel, Split, Digits, Metaspace, Punctuation, Whitespace, "
        "WhitespaceSplit, BertPreTokenizer, CharDelimiterSplit, FixedLength, Sequence");
}

/* ---- decoders */
static choir_status read_mark(const json_t *part, const char *where, const char *field,
                              choir_decode_stage *stage)
{
    uint32_t c;
    CHOIR_TRY(get_character(part, where, field, &c));
    stage->mark_bytes = (uint8_t)choir_utf8_put(c, stage->mark);
    return CHOIR_OK;
}

static choir_status read_decoder(choir_tokenizer *t, const json_t *part, const char *where,
                                 uint32_t depth)
{
    static const struct {
        const char *type;
        choir_decode_kind kind;
    } kinds[] = {
        {"ByteLevel", CHOIR_DECODE_BYTE_LEVEL},
        {"ByteFallback", CHOIR_DECODE_BYTE_FALLBACK},
        {"Fuse", CHOIR_DECODE_FUSE},
        {"Strip", CHOIR_DECODE_STRIP},
        {"Replace", CHOIR_DECODE_REPLACE},
        {"Metaspace", CHOIR_DECODE_METASPACE},
    };
    const char *type = json_string_value(json_object_get(part, "type"));
    (void)depth;
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (strcmp(type, kinds[i].type) != 0) continue;
        choir_decode_stage *stage;
        CHOIR_TRY(choir_tokenizer_add_decode(t, kinds[i].kind, &stage));
        if (stage->kind == CHOIR_DECODE_STRIP) {
            CHOIR_TRY(read_mark(part, where, "content", stage));
            CHOIR_TRY(get_count(part, where, "start", 0, &stage->start));
            return get_count(part, where, "stop", 0, &stage->stop);
        }
        if (stage->kind == CHOIR_DECODE_REPLACE) {
            CHOIR_TRY(get_content(part, where, "content", &stage->content, &stage->content_bytes));
            return get_pattern(part, where, &stage->pattern);
        }
        if (stage->kind == CHOIR_DECODE_METASPACE) {
            choir_prepend prepend;
            CHOIR_TRY(read_prepend(part, where, &prepend));
            stage->strip_first = prepend != CHOIR_PREPEND_NEVER;
            return read_mark(part, where, "replacement", stage);
        }
        return CHOIR_OK;
    }
    return unknown_type(
        where, type, "known: ByteLevel, ByteFallback, Fuse, Strip, Replace, Metaspace, Sequence");
}

/* ---- post-processors */
/* Puts `before`, the text as it was so far, and `after` into the list. */
static choir_status wrap_post(choir_tokenizer *t, int64_t before, int64_t after)
{
    CHOIR_TRY(choir_tokenizer_add_post(t, 0));
    memmove(t->post + 1, t->post, (t->n_post - 1) * sizeof *t->post);
    t->post[0] = before;
    return choir_tokenizer_add_post(t, after);
}

/* RobertaProcessing and BertProcessing: {"cls": ["<s>", 0], "sep": ["</s>", 2]} */
static choir_status read_pair(const json_t *part, const char *where, const char *field, int64_t *id)
{
    const json_t *value = json_array_get(json_object_get(part, field), 1);
    if (!json_is_integer(value) || json_integer_value(value) < 0 ||
        json_integer_value(value) >= UINT32_MAX)
        return bad(where, field, "[token, id] is wanted");
    *id = json_integer_value(value);
    return CHOIR_OK;
}

static choir_status add_template_token(choir_tokenizer *t, const json_t *tokens,
                                       const json_t *piece, const char *where, choir_ids *ids,
                                       size_t *n_text)
{
    const char *name = json_string_value(json_object_get(piece, "id"));
    const json_t *list =
        name == NULL ? NULL : json_object_get(json_object_get(tokens, name), "ids");
    if (!json_is_array(list)) return bad(where, "single", "a special token without its ids");
    size_t i;
    json_t *id;
    (void)t;
    (void)n_text;
    json_array_foreach(list, i, id)
    {
        if (!json_is_integer(id) || json_integer_value(id) < 0 ||
            json_integer_value(id) >= UINT32_MAX)
            return bad(where, "special_tokens", "an id is wanted");
        CHOIR_TRY(choir_ids_push(ids, (uint32_t)json_integer_value(id)));
    }
    return CHOIR_OK;
}

/* The template's pieces; the sequence's place is CHOIR_NO_ID in *ids. */
static choir_status read_template(choir_tokenizer *t, const json_t *part, const char *where,
                                  choir_ids *ids)
{
    const json_t *single = json_object_get(part, "single");
    const json_t *tokens = json_object_get(part, "special_tokens");
    if (!json_is_array(single)) return bad(where, "single", "an array is wanted");
    size_t i, n_text = 0;
    json_t *piece;
    json_array_foreach(single, i, piece)
    {
        const json_t *sequence = json_object_get(piece, "Sequence");
        const json_t *special = json_object_get(piece, "SpecialToken");
        if (special != NULL) {
            CHOIR_TRY(add_template_token(t, tokens, special, where, ids, &n_text));
            continue;
        }
        const char *id = json_string_value(json_object_get(sequence, "id"));
        if (id == NULL || strcmp(id, "A") != 0)
            return bad(where, "single", "a sequence that is not A");
        if (++n_text > 1) return bad(where, "single", "the sequence A twice");
        CHOIR_TRY(choir_ids_push(ids, CHOIR_NO_ID));
    }
    return CHOIR_OK;
}

static choir_status read_post(choir_tokenizer *t, const json_t *part, const char *where,
                              uint32_t depth)
{
    const char *type = json_string_value(json_object_get(part, "type"));
    (void)depth;
    if (strcmp(type, "ByteLevel") == 0) return CHOIR_OK; /* it moves offsets only */
    if (strcmp(type, "RobertaProcessing") == 0 || strcmp(type, "BertProcessing") == 0) {
        int64_t cls, sep;
        CHOIR_TRY(read_pair(part, where, "cls", &cls));
        CHOIR_TRY(read_pair(part, where, "sep", &sep));
        return wrap_post(t, cls, sep);
    }
    if (strcmp(type, "TemplateProcessing") != 0)
        return unknown_type(
            where, type,
            "known: TemplateProcessing, ByteLevel, RobertaProcessing, BertProcessing, "
            "Sequence");
    if (t->n_post != 1)
        return bad(where, "type", "a template behind another processor is not supported");
    choir_ids ids = {0};
    choir_status status = read_template(t, part, where, &ids);
    if (status == CHOIR_OK) t->n_post = 0;
    for (size_t i = 0; status == CHOIR_OK && i < ids.n; i++)
        status = choir_tokenizer_add_post(t, ids.data[i] == CHOIR_NO_ID ? CHOIR_POST_TEXT
                                                                        : (int64_t)ids.data[i]);
    choir_free(ids.data);
    return status;
}

/* ---- the model */
/* The ids may have holes, but not more than the file has bytes: memory is bounded by the file. */
static choir_status read_vocab(choir_tokenizer *t, json_t *vocab, size_t file_bytes)
{
    if (!json_is_object(vocab)) return bad("model", "vocab", "an object is wanted");
    size_t text_bytes = 0;
    json_int_t most = -1;
    const char *key;
    size_t key_bytes;
    json_t *id;
    json_object_keylen_foreach(vocab, key, key_bytes, id)
    {
        json_int_t value = json_integer_value(id);
        if (!json_is_integer(id) || value < 0 || (uint64_t)value >= file_bytes ||
            value >= (json_int_t)UINT32_MAX / 2)
            return choir_fail(
                CHOIR_E_FORMAT,
                "tokenizer.json: model.vocab: the id of \"%.60s\" must be a number from 0 to "
                "%zu (the file's bytes)",
                key, file_bytes);
        if (value > most) most = value;
        text_bytes += key_bytes;
    }
    CHOIR_TRY(
        choir_vocab_create(&t->vocab, (uint32_t)(most + 1), text_bytes, json_object_size(vocab)));
    json_object_keylen_foreach(vocab, key, key_bytes, id)
        CHOIR_TRY(choir_vocab_add(&t->vocab, (uint32_t)json_integer_value(id), key, key_bytes));
    return CHOIR_OK;
}

static choir_status read_merge(choir_tokenizer *t, const json_t *merge, uint32_t rank)
{
    const char *left = json_string_value(merge), *right;
    size_t left_bytes, right_bytes;
    if (left != NULL) { /* "a b" */
        size_t bytes = json_string_length(merge);
        const char *space = memchr(left, ' ', bytes);
        if (space == NULL || memchr(space + 1, ' ', bytes - (size_t)(space - left) - 1) != NULL)
            return choir_fail(CHOIR_E_FORMAT,
                              "tokenizer.json: model.merges[%u] \"%.60s\" is no pair of two tokens",
                              rank, left);
        left_bytes = (size_t)(space - left);
        right = space + 1;
        right_bytes = bytes - left_bytes - 1;
    } else { /* ["a", "b"] */
        const json_t *a = json_array_get(merge, 0), *b = json_array_get(merge, 1);
        if (!json_is_string(a) || !json_is_string(b) || json_array_size(merge) != 2)
            return choir_fail(CHOIR_E_FORMAT,
                              "tokenizer.json: model.merges[%u] is no pair of two tokens", rank);
        left = json_string_value(a);
        left_bytes = json_string_length(a);
        right = json_string_value(b);
        right_bytes = json_string_length(b);
    }
    choir_status status =
        choir_bpe_add_merge(&t->bpe, &t->vocab, rank, left, left_bytes, right, right_bytes);
    return status == CHOIR_OK ? status : choir_fail_in(status, "tokenizer.json: model.merges");
}

static choir_status read_merges(choir_tokenizer *t, const json_t *merges)
{
    if (!json_is_array(merges)) return bad("model", "merges", "an array is wanted");
    size_t i;
    json_t *merge;
    uint32_t rank = 0;
    CHOIR_TRY(choir_bpe_create(&t->bpe, &t->vocab, json_array_size(merges)));
    json_array_foreach(merges, i, merge)
    {
        const char *text = json_string_value(merge);
        if (text != NULL && strncmp(text, "#version", 8) == 0) continue;
        CHOIR_TRY(read_merge(t, merge, rank++));
    }
    return CHOIR_OK;
}

static choir_status refuse_affix(const json_t *model, const char *field)
{
    const json_t *value = json_object_get(model, field);
    if (value == NULL || json_is_null(value)) return CHOIR_OK;
    const char *text = json_string_value(value);
    if (text != NULL && text[0] == '\0') return CHOIR_OK;
    return choir_fail(CHOIR_E_UNIMPLEMENTED,
                      "tokenizer.json: model.%s (\"%.60s\") is not supported", field,
                      text != NULL ? text : "not a string");
}

static choir_status read_model(choir_tokenizer *t, const json_t *model, size_t file_bytes)
{
    if (!json_is_object(model))
        return choir_fail(CHOIR_E_FORMAT, "tokenizer.json: model: an object is wanted");
    const char *type = json_string_value(json_object_get(model, "type"));
    if (type == NULL && json_object_get(model, "merges") != NULL) type = "BPE"; /* older files */
    if (type == NULL) return bad("model", "type", "a string is wanted");
    if (strcmp(type, "BPE") != 0) return unknown_type("model", type, "known: BPE");
    CHOIR_TRY(refuse_affix(model, "continuing_subword_prefix"));
    CHOIR_TRY(refuse_affix(model, "end_of_word_suffix"));
    const json_t *dropout = json_object_get(model, "dropout");
    if (json_is_number(dropout) && json_number_value(dropout) != 0)
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "tokenizer.json: model.dropout (%g) would make ids random; it is not supported",
            json_number_value(dropout));
    CHOIR_TRY(read_vocab(t, json_object_get(model, "vocab"), file_bytes));
    CHOIR_TRY(read_merges(t, json_object_get(model, "merges")));
    CHOIR_TRY(get_bool(model, "model", "byte_fallback", false, &t->bpe.byte_fallback));
    CHOIR_TRY(get_bool(model, "model", "fuse_unk", false, &t->bpe.fuse_unknown));
    CHOIR_TRY(get_bool(model, "model", "ignore_merges", false, &t->bpe.ignore_merges));
    const json_t *unknown = json_object_get(model, "unk_token");
    if (unknown != NULL && !json_is_null(unknown)) {
        const char *text;
        size_t bytes;
        CHOIR_TRY(get_text(model, "model", "unk_token", &text, &bytes));
        t->bpe.unknown_id = choir_vocab_find(&t->vocab, text, bytes);
        /* Byte-level files name an unknown token that no text can need, in the vocabulary or not.
         */
        if (t->bpe.unknown_id == CHOIR_NO_ID && !t->bpe.all_bytes)
            return choir_fail(CHOIR_E_FORMAT,
                              "tokenizer.json: model.unk_token \"%.60s\" is not in the vocabulary",
                              text);
    }
    return CHOIR_OK;
}

static choir_status read_added(choir_tokenizer *t, const json_t *list)
{
    if (list == NULL || json_is_null(list)) return CHOIR_OK;
    if (!json_is_array(list))
        return choir_fail(CHOIR_E_FORMAT, "tokenizer.json: added_tokens: an array is wanted");
    size_t i;
    json_t *one;
    json_array_foreach(list, i, one)
    {
        char where[48];
        const char *content;
        size_t bytes;
        choir_added_token a = {0};
        snprintf(where, sizeof where, "added_tokens[%zu]", i);
        CHOIR_TRY(get_text(one, where, "content", &content, &bytes));
        CHOIR_TRY(get_bool(one, where, "single_word", false, &a.single_word));
        CHOIR_TRY(get_bool(one, where, "lstrip", false, &a.lstrip));
        CHOIR_TRY(get_bool(one, where, "rstrip", false, &a.rstrip));
        CHOIR_TRY(get_bool(one, where, "special", false, &a.special));
        CHOIR_TRY(get_bool(one, where, "normalized", !a.special, &a.normalized));
        CHOIR_TRY(choir_tokenizer_add_token(t, content, bytes, a));
    }
    return CHOIR_OK;
}

static choir_status read_all(choir_tokenizer *t, const json_t *root, size_t file_bytes)
{
    CHOIR_TRY(read_model(t, json_object_get(root, "model"), file_bytes));
    CHOIR_TRY(read_parts(t, json_object_get(root, "normalizer"), "normalizer", "normalizers", 0,
                         read_normalizer));
    CHOIR_TRY(read_parts(t, json_object_get(root, "pre_tokenizer"), "pre_tokenizer",
                         "pretokenizers", 0, read_pre_tokenizer));
    CHOIR_TRY(
        read_parts(t, json_object_get(root, "decoder"), "decoder", "decoders", 0, read_decoder));
    CHOIR_TRY(read_added(t, json_object_get(root, "added_tokens")));
    CHOIR_TRY(choir_tokenizer_add_post(t, CHOIR_POST_TEXT));
    CHOIR_TRY(read_parts(t, json_object_get(root, "post_processor"), "post_processor", "processors",
                         0, read_post));
    for (size_t i = 0; i < t->n_post; i++)
        if (t->post[i] != CHOIR_POST_TEXT && !choir_vocab_has(&t->vocab, (uint32_t)t->post[i]))
            return choir_fail(
                CHOIR_E_FORMAT,
                "tokenizer.json: post_processor adds id %lld, which the vocabulary lacks",
                (long long)t->post[i]);
    t->kind = t->bpe.byte_fallback ? "BPE with byte fallback" : "BPE";
    for (size_t i = 0; i < t->n_split; i++)
        if (t->split[i].kind == CHOIR_SPLIT_BYTES) t->kind = "byte-level BPE";
    return choir_tokenizer_finish(t);
}

choir_status choir_tokenizer_parse_json(const char *json, size_t bytes, choir_tokenizer **out)
{
    json_error_t error;
    json_t *root = json_loadb(json, bytes, JSON_ALLOW_NUL, &error);
    if (root == NULL)
        return choir_fail(CHOIR_E_FORMAT, "tokenizer.json: %s (line %d, column %d)", error.text,
                          error.line, error.column);
    choir_tokenizer *t = NULL;
    choir_status status = json_is_object(root)
                              ? choir_tokenizer_new(&t)
                              : choir_fail(CHOIR_E_FORMAT, "tokenizer.json: an object is wanted");
    if (status == CHOIR_OK) status = read_all(t, root, bytes);
    json_decref(root);
    if (status == CHOIR_OK) {
        *out = t;
        return CHOIR_OK;
    }
    choir_tokenizer_destroy(t);
    return status;
}

/* A token of tokenizer_config.json is a string or an object with "content". */
static void read_named(choir_tokenizer *t, const json_t *root, const char *field, int32_t *out)
{
    const json_t *value = json_object_get(root, field);
    if (json_is_object(value)) value = json_object_get(value, "content");
    if (!json_is_string(value)) return;
    uint32_t id = choir_vocab_find(&t->vocab, json_string_value(value), json_string_length(value));
    if (id != CHOIR_NO_ID) *out = (int32_t)id;
}

choir_status choir_tokenizer_read_config(choir_tokenizer *t, const char *json, size_t bytes)
{
    json_error_t error;
    /* model_max_length is often 1e30, written as a whole number that no integer holds. */
    json_t *root = json_loadb(json, bytes, JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, &error);
    if (root == NULL)
        return choir_fail(CHOIR_E_FORMAT, "tokenizer_config.json: %s (line %d, column %d)",
                          error.text, error.line, error.column);
    read_named(t, root, "bos_token", &t->bos);
    read_named(t, root, "eos_token", &t->eos);
    json_decref(root);
    return CHOIR_OK;
}
