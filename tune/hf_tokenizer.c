/* tokenizer.json as the tokenizers library reads it, from GGUF metadata: byte-level BPE (Sennrich
 * et al. 2016) with the pre-tokenizer that tokenizer.ggml.pre names. */
#include "engine/gguf.h"
#include "tune/hf_files.h"

#include <string.h>

/* What tokenizer.ggml.token_type says of an id. */
enum { TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_USER_DEFINED = 4 };

#define LLAMA3_PATTERN(digits)                                                                     \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" digits                           \
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* The pre-tokenizers that tokenizer.json is written for: GPT-2's own pattern is part of ByteLevel.
 */
static const struct pre {
    const char *name;
    bool digits;         /* Digits comes first: one by one */
    const char *pattern; /* of a Split in place of GPT-2's pattern */
    bool nfc;
    bool ignore_merges;
} known_pres[] = {
    {"gpt-2", false, NULL, false, false},
    {"smollm", true, NULL, false, false},
    {"llama-bpe", false, LLAMA3_PATTERN("\\p{N}{1,3}"), false, true},
    {"qwen2", false, LLAMA3_PATTERN("\\p{N}"), true, false},
};

static const struct pre *find_pre(choir_text name)
{
    for (size_t i = 0; i < sizeof known_pres / sizeof *known_pres; i++)
        if (name.bytes == strlen(known_pres[i].name) &&
            memcmp(name.data, known_pres[i].name, name.bytes) == 0)
            return &known_pres[i];
    return NULL;
}

static bool is_text(const choir_gguf *gguf, const char *key, const char *wanted)
{
    choir_text text;
    return choir_gguf_string(gguf, key, &text) && text.bytes == strlen(wanted) &&
           memcmp(text.data, wanted, text.bytes) == 0;
}

static bool flag(const choir_gguf *gguf, const char *key)
{
    int64_t value = 0;
    return choir_gguf_integer(gguf, key, &value) && value != 0;
}

static json_t *text_of(choir_text text)
{
    return json_stringn(text.data, text.bytes);
}

/* The piece of the id under `key`, or JSON's null. */
static json_t *piece_of(const choir_gguf *gguf, const char *key)
{
    const choir_gguf_array *tokens = choir_gguf_find_array(gguf, "tokenizer.ggml.tokens");
    choir_text piece;
    int64_t id;
    if (!choir_gguf_integer(gguf, key, &id) || id < 0 ||
        !choir_gguf_array_string(tokens, (uint64_t)id, &piece))
        return json_null();
    return text_of(piece);
}

static json_t *byte_level(bool use_regex)
{
    return json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0,
                     "trim_offsets", 1, "use_regex", use_regex);
}

static json_t *pre_tokenizer_of(const struct pre *pre)
{
    json_t *steps = json_array();
    if (pre->digits)
        choir_tune_json_append(&steps,
                               json_pack("{s:s, s:b}", "type", "Digits", "individual_digits", 1));
    if (pre->pattern != NULL)
        choir_tune_json_append(&steps, json_pack("{s:s, s:{s:s}, s:s, s:b}", "type", "Split",
                                                 "pattern", "Regex", pre->pattern, "behavior",
                                                 "Isolated", "invert", 0));
    choir_tune_json_append(&steps, byte_level(pre->pattern == NULL));
    return json_pack("{s:s, s:o}", "type", "Sequence", "pretokenizers", steps);
}

static json_t *added_tokens(const choir_gguf *gguf, const choir_gguf_array *tokens)
{
    const choir_gguf_array *types = choir_gguf_find_array(gguf, "tokenizer.ggml.token_type");
    json_t *list = json_array();
    for (uint64_t i = 0; types != NULL && i < choir_gguf_array_count(types); i++) {
        int64_t type = 0;
        choir_text piece;
        choir_gguf_array_integer(types, i, &type);
        if (type != TYPE_CONTROL && type != TYPE_USER_DEFINED && type != TYPE_UNKNOWN) continue;
        if (!choir_gguf_array_string(tokens, i, &piece)) continue;
        bool special = type != TYPE_USER_DEFINED;
        choir_tune_json_append(&list,
                               json_pack("{s:I, s:o, s:b, s:b, s:b, s:b, s:b}", "id", (json_int_t)i,
                                         "content", text_of(piece), "single_word", 0, "lstrip", 0,
                                         "rstrip", 0, "normalized", 0, "special", special));
    }
    return list;
}

static choir_status bad_token(const char *key, uint64_t i)
{
    return choir_fail(CHOIR_E_FORMAT, "%s[%llu] is no text that JSON can hold, or is there twice",
                      key, (unsigned long long)i);
}

static choir_status put_vocabulary(const choir_gguf_array *tokens, json_t *vocabulary)
{
    for (uint64_t i = 0; i < choir_gguf_array_count(tokens); i++) {
        choir_text piece;
        if (!choir_gguf_array_string(tokens, i, &piece) ||
            memchr(piece.data, '\0', piece.bytes) != NULL ||
            json_object_getn(vocabulary, piece.data, piece.bytes) != NULL ||
            json_object_setn_new(vocabulary, piece.data, piece.bytes,
                                 json_integer((json_int_t)i)) != 0)
            return bad_token("tokenizer.ggml.tokens", i);
    }
    return CHOIR_OK;
}

/* GGUF writes a merge as "left right"; neither holds a space, since bytes were mapped to letters.
 */
static choir_status put_merges(const choir_gguf_array *merges, json_t *list)
{
    for (uint64_t i = 0; merges != NULL && i < choir_gguf_array_count(merges); i++) {
        choir_text merge;
        if (!choir_gguf_array_string(merges, i, &merge))
            return bad_token("tokenizer.ggml.merges", i);
        const char *space = memchr(merge.data, ' ', merge.bytes);
        if (space == NULL) return bad_token("tokenizer.ggml.merges", i);
        size_t left = (size_t)(space - merge.data);
        json_t *pair = json_pack("[s%, s%]", merge.data, left, space + 1, merge.bytes - left - 1);
        if (json_array_append_new(list, pair) != 0) return bad_token("tokenizer.ggml.merges", i);
    }
    return CHOIR_OK;
}

/* BOS before the text where the file asks for it, as a template processor. */
static json_t *post_processor(const choir_gguf *gguf)
{
    int64_t bos;
    if (!flag(gguf, "tokenizer.ggml.add_bos_token") ||
        !choir_gguf_integer(gguf, "tokenizer.ggml.bos_token_id", &bos))
        return byte_level(true);
    json_t *piece = piece_of(gguf, "tokenizer.ggml.bos_token_id");
    const char *name = json_string_value(piece);
    if (name == NULL) name = "";
    json_t *out =
        json_pack("{s:s, s:[{s:{s:s, s:i}}, {s:{s:s, s:i}}], s:[{s:{s:s, s:i}}, {s:{s:s, s:i}}, "
                  "{s:{s:s, s:i}}, "
                  "{s:{s:s, s:i}}], s:{s:{s:s, s:[I], s:[s]}}}",
                  "type", "TemplateProcessing", "single", "SpecialToken", "id", name, "type_id", 0,
                  "Sequence", "id", "A", "type_id", 0, "pair", "SpecialToken", "id", name,
                  "type_id", 0, "Sequence", "id", "A", "type_id", 0, "SpecialToken", "id", name,
                  "type_id", 1, "Sequence", "id", "B", "type_id", 1, "special_tokens", name, "id",
                  name, "ids", (json_int_t)bos, "tokens", name);
    json_decref(piece);
    return out;
}

static json_t *tokenizer_config(const choir_gguf *gguf, uint32_t max_positions)
{
    return json_pack(
        "{s:s, s:o, s:o, s:o, s:o, s:b, s:b, s:b, s:I}", "tokenizer_class",
        "PreTrainedTokenizerFast", "bos_token", piece_of(gguf, "tokenizer.ggml.bos_token_id"),
        "eos_token", piece_of(gguf, "tokenizer.ggml.eos_token_id"), "unk_token",
        piece_of(gguf, "tokenizer.ggml.unknown_token_id"), "pad_token",
        piece_of(gguf, "tokenizer.ggml.padding_token_id"), "add_prefix_space", 0, "add_bos_token",
        flag(gguf, "tokenizer.ggml.add_bos_token"), "clean_up_tokenization_spaces", 0,
        "model_max_length", (json_int_t)max_positions);
}

choir_status choir_tune_save_tokenizer(const choir_gguf *gguf, uint32_t max_positions,
                                       const char *folder)
{
    const choir_gguf_array *tokens = choir_gguf_find_array(gguf, "tokenizer.ggml.tokens");
    choir_text pre_name = {"", 0};
    choir_gguf_string(gguf, "tokenizer.ggml.pre", &pre_name);
    const struct pre *pre = find_pre(pre_name);
    if (tokens == NULL || !is_text(gguf, "tokenizer.ggml.model", "gpt2") || pre == NULL)
        return choir_fail(
            CHOIR_E_UNIMPLEMENTED,
            "the base's tokenizer (tokenizer.ggml.pre \"%.*s\") cannot be written as "
            "tokenizer.json; known are gpt-2, smollm, llama-bpe and qwen2; name a .gguf "
            "file as the output",
            (int)(pre_name.bytes < 60 ? pre_name.bytes : 60), pre_name.data);
    json_t *vocabulary = json_object(), *merges = json_array();
    choir_status status = put_vocabulary(tokens, vocabulary);
    if (status == CHOIR_OK)
        status = put_merges(choir_gguf_find_array(gguf, "tokenizer.ggml.merges"), merges);
    if (status != CHOIR_OK) {
        json_decref(vocabulary);
        json_decref(merges);
        return status;
    }
    json_t *model = json_pack(
        "{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:b, s:o, s:o}", "type", "BPE", "dropout", "unk_token",
        "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0,
        "ignore_merges", pre->ignore_merges, "vocab", vocabulary, "merges", merges);
    json_t *normalizer = pre->nfc ? json_pack("{s:s}", "type", "NFC") : json_null();
    json_t *all =
        json_pack("{s:s, s:n, s:n, s:o, s:o, s:o, s:o, s:o, s:o}", "version", "1.0", "truncation",
                  "padding", "added_tokens", added_tokens(gguf, tokens), "normalizer", normalizer,
                  "pre_tokenizer", pre_tokenizer_of(pre), "post_processor", post_processor(gguf),
                  "decoder", byte_level(true), "model", model);
    CHOIR_TRY(choir_tune_save_json(folder, "tokenizer.json", all));
    return choir_tune_save_json(folder, "tokenizer_config.json",
                                tokenizer_config(gguf, max_positions));
}
