/* A tokenizer out of GGUF metadata. The input is either a whole GGUF image, or (what a fuzzer can
 * change without breaking every length) a short form from which an image is written:
 *   flags, name of the pre-tokenizer, tokens, merges
 * A string is one byte of length and its bytes; an empty string ends a list; behind each token lie
 * its type and its score. */
#include "tests/support/gguf_image.h"
#include "tokenizer_check.h"

#include <stdio.h>

enum { MAX_TOKENS = 2000 };
enum { SENTENCEPIECE = 1, BOS = 2, EOS = 4, PREFIX = 8, COLLAPSE = 16, BYTES = 32, TYPES = 64 };

typedef struct input {
    const uint8_t *at, *end;
} input;

static gguf_image image;
static struct tokens {
    choir_text text[MAX_TOKENS];
    int32_t type[MAX_TOKENS];
    float score[MAX_TOKENS];
    uint32_t n;
} tokens;

static uint8_t take(input *in)
{
    return in->at < in->end ? *in->at++ : 0;
}

static choir_text take_text(input *in)
{
    size_t bytes = take(in), left = (size_t)(in->end - in->at);
    choir_text text = {(const char *)in->at, bytes < left ? bytes : left};
    in->at += text.bytes;
    return text;
}

static void add_token(choir_text text, int32_t type, float score)
{
    if (tokens.n == MAX_TOKENS) return;
    tokens.text[tokens.n] = text;
    tokens.type[tokens.n] = type;
    tokens.score[tokens.n++] = score;
}

/* The 256 bytes, as GPT-2 writes them or as <0x00>. */
static void add_bytes(bool sentencepiece)
{
    static char names[2][256][8];
    for (unsigned i = 0, above = 256; i < 256; i++) {
        bool visible = (i > 32 && i < 127) || (i > 160 && i != 173);
        unsigned c = visible ? i : above++;
        char *gpt2 = names[0][i];
        if (c < 128)
            snprintf(gpt2, 8, "%c", c);
        else
            snprintf(gpt2, 8, "%c%c", 0xC0 | c >> 6, 0x80 | (c & 63));
        snprintf(names[1][i], 8, "<0x%02X>", i);
        const char *name = names[sentencepiece][i];
        add_token((choir_text){name, strlen(name)}, sentencepiece ? 6 : 1, 0);
    }
}

static void put_tokens(bool types)
{
    gguf_put_array(&image, "tokenizer.ggml.tokens", GGUF_STRING, tokens.n);
    for (uint32_t i = 0; i < tokens.n; i++) gguf_put_text(&image, tokens.text[i]);
    gguf_put_array(&image, "tokenizer.ggml.scores", GGUF_F32, tokens.n);
    gguf_put(&image, tokens.score, tokens.n * sizeof *tokens.score);
    if (!types) return;
    gguf_put_array(&image, "tokenizer.ggml.token_type", GGUF_I32, tokens.n);
    gguf_put(&image, tokens.type, tokens.n * sizeof *tokens.type);
}

static void put_merges(input *in)
{
    input ahead = *in;
    uint64_t n = 0;
    while (take_text(&ahead).bytes > 0) n++;
    gguf_put_array(&image, "tokenizer.ggml.merges", GGUF_STRING, n);
    while (n-- > 0) gguf_put_text(&image, take_text(in));
}

static void put_flags(uint8_t flags)
{
    gguf_put_flag(&image, "tokenizer.ggml.add_bos_token", flags & BOS);
    gguf_put_flag(&image, "tokenizer.ggml.add_eos_token", flags & EOS);
    gguf_put_flag(&image, "tokenizer.ggml.add_space_prefix", flags & PREFIX);
    gguf_put_flag(&image, "tokenizer.ggml.remove_extra_whitespaces", flags & COLLAPSE);
    gguf_put_u32(&image, "tokenizer.ggml.unknown_token_id", 0);
    gguf_put_u32(&image, "tokenizer.ggml.bos_token_id", 1);
    gguf_put_u32(&image, "tokenizer.ggml.eos_token_id", 2);
}

static void write_image(input *in)
{
    uint8_t flags = take(in);
    bool sentencepiece = flags & SENTENCEPIECE;
    tokens.n = 0;
    gguf_image_begin(&image);
    gguf_put_key(&image, "tokenizer.ggml.model", GGUF_STRING);
    gguf_put_text(&image, sentencepiece ? (choir_text){"llama", 5} : (choir_text){"gpt2", 4});
    gguf_put_key(&image, "tokenizer.ggml.pre", GGUF_STRING);
    gguf_put_text(&image, take_text(in));
    put_flags(flags);
    for (choir_text text; (text = take_text(in)).bytes > 0;) {
        int32_t type = (int8_t)take(in);
        add_token(text, type, (float)(int8_t)take(in));
    }
    if (flags & BYTES) add_bytes(sentencepiece);
    put_tokens(flags & TYPES);
    put_merges(in);
    gguf_image_end(&image);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    choir_gguf *file;
    choir_tokenizer *t;
    if (bytes < 4 || memcmp(data, "GGUF", 4) != 0) {
        write_image(&(input){data, data + bytes});
        data = image.bytes;
        bytes = image.n;
    }
    if (choir_gguf_parse("fuzz", data, bytes, &file) != CHOIR_OK) return 0;
    choir_status status = choir_tokenizer_parse_gguf(file, &t);
    choir_gguf_close(file); /* the tokenizer keeps copies */
    if (status != CHOIR_OK) {
        check_refusal(status);
        return 0;
    }
    check_nasty_texts(t);
    check_every_id(t);
    choir_tokenizer_destroy(t);
    return 0;
}
