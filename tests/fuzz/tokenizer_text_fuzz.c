/* One byte that chooses a tokenizer, then any bytes as text: valid UTF-8 is always encoded,
 * anything else is refused; where the tokenizer loses nothing, decode(encode(text)) is the text. */
#include "tests/support/tokenizer_case.h"
#include "tokenizer_check.h"

static const struct {
    const char *name;
    bool lossless;
} cases[] = {
    {"smollm", true},         {"llama3", true},
    {"gpt2", true},           {"gpt4o", true},
    {"deepseek3", true},      {"tekken", true},
    {"cl100k", true},         {"kimi", true},
    {"falcon", true},         {"superbpe", true},
    {"bytes-first", true},    {"deepseek-coder", true},
    {"qwen35", false},        {"llama2", false},
    {"gemma", false},         {"metaspace-first-cut", false},
    {"normal-nfkc", false},   {"normal-sequence", false},
    {"added-flags", false},   {"decoder-fused", false},
    {"unknown-fused", false}, {"whitespace", false},
};
enum { N_CASES = sizeof cases / sizeof *cases };
static choir_tokenizer *tokenizers[N_CASES];

static const choir_tokenizer *tokenizer(size_t i)
{
    if (tokenizers[i] == NULL)
        tokenizers[i] = tokenizer_case_open("tests/fixtures/tokenizer", cases[i].name);
    return tokenizers[i];
}

static bool is_utf8(const char *text, size_t bytes)
{
    json_t *string = json_stringn(text, bytes);
    json_decref(string);
    return string != NULL;
}

static void check_same(const choir_tokenizer *t, const char *text, size_t bytes, bool parse_special)
{
    uint32_t *ids;
    char *back;
    size_t n, back_bytes;
    const choir_encode_options options = {.parse_special = parse_special};
    CHOIR_ASSERT(choir_tokenizer_encode(t, text, bytes, options, &ids, &n) == CHOIR_OK);
    CHOIR_ASSERT(choir_tokenizer_decode(t, ids, n, false, &back, &back_bytes) == CHOIR_OK);
    CHOIR_ASSERT(back_bytes == bytes && memcmp(back, text, bytes) == 0);
    choir_free(back);
    choir_free(ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (bytes == 0) return 0;
    size_t which = data[0] % N_CASES, n;
    const choir_tokenizer *t = tokenizer(which);
    const char *text = (const char *)data + 1;
    uint32_t *ids;
    bytes--;
    choir_status status =
        choir_tokenizer_encode(t, text, bytes, CHOIR_ENCODE_OPTIONS_DEFAULT, &ids, &n);
    CHOIR_ASSERT(status == (is_utf8(text, bytes) ? CHOIR_OK : CHOIR_E_INVALID));
    if (status != CHOIR_OK) return 0;
    CHOIR_ASSERT(check_decode(t, ids, n, false) && check_decode(t, ids, n, true));
    choir_free(ids);
    if (!cases[which].lossless) return 0;
    check_same(t, text, bytes, true);
    check_same(t, text, bytes, false);
    return 0;
}
