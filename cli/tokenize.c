/* `tokenize` and `detokenize`: exact ids, and back. */
#include "cli/cli.h"

#include <stdio.h>
#include <string.h>

enum { MAX_TEXT_BYTES = 1 << 30 };

typedef struct values {
    const char *file;
    bool json, no_special;
} values;
static const values defaults = {0};
static const choir_option options[] = {
    {"file", 'f', CHOIR_OPTION_TEXT, offsetof(values, file), "FILE", "the text instead of TEXT", 0,
     0},
    {"json", 0, CHOIR_OPTION_FLAG, offsetof(values, json), NULL, "one JSON object", 0, 0},
    {"no-special", 0, CHOIR_OPTION_FLAG, offsetof(values, no_special), NULL,
     "no BOS is added; special tokens in the text stay text", 0, 0},
};

static choir_status check(const void *verb_values, const choir_arguments *arguments)
{
    const values *v = verb_values;
    if ((v->file != NULL) == (arguments->n_positional == 2))
        return choir_fail(CHOIR_E_INVALID, "give it either behind MODEL or with --file");
    return CHOIR_OK;
}

static choir_status open_tokenizer(const char *model, choir_model_file **file,
                                   choir_tokenizer **out)
{
    char path[4096];
    CHOIR_TRY(choir_cli_find_model(model, path, sizeof path));
    CHOIR_TRY(choir_model_file_open(path, file));
    return choir_tokenizer_open(*file, out);
}

static choir_status print_ids(const choir_tokenizer *t, const uint32_t *ids, size_t n, bool json)
{
    if (!json) {
        for (size_t i = 0; i < n; i++) printf("%s%u", i > 0 ? "," : "", ids[i]);
        putchar('\n');
        return CHOIR_OK;
    }
    json_t *o = json_object(), *list = json_array(), *pieces = json_array();
    for (size_t i = 0; i < n; i++) {
        size_t bytes = 0;
        const char *piece = choir_tokenizer_piece(t, ids[i], &bytes);
        json_t *text = piece == NULL ? NULL : json_stringn(piece, bytes);
        json_array_append_new(list, json_integer(ids[i]));
        json_array_append_new(pieces, text != NULL ? text : json_null());
    }
    json_object_set_new(o, "ids", list);
    json_object_set_new(o, "pieces", pieces);
    json_object_set_new(o, "count", json_integer((json_int_t)n));
    choir_cli_print_json(o, false);
    return CHOIR_OK;
}

static choir_status run_tokenize(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    choir_model_file *file = NULL;
    choir_tokenizer *t = NULL;
    char *owned = NULL;
    uint32_t *ids = NULL;
    size_t n, bytes;
    choir_status status;
    CHOIR_TRY_TO(done, status, open_tokenizer(arguments->positional[0], &file, &t));
    if (v->file != NULL)
        CHOIR_TRY_TO(done, status, choir_file_read(v->file, MAX_TEXT_BYTES, &owned, &bytes));
    const char *text = owned != NULL ? owned : arguments->positional[1];
    if (owned == NULL) bytes = strlen(text);
    const choir_encode_options o = {!v->no_special, !v->no_special};
    CHOIR_TRY_TO(done, status, choir_tokenizer_encode(t, text, bytes, o, &ids, &n));
    status = print_ids(t, ids, n, v->json);
done:
    choir_free(ids);
    choir_free(owned);
    choir_tokenizer_destroy(t);
    choir_model_file_close(file);
    return status;
}

static choir_status run_detokenize(void *verb_values, choir_arguments *arguments)
{
    const values *v = verb_values;
    choir_model_file *file = NULL;
    choir_tokenizer *t = NULL;
    char *owned = NULL, *text = NULL;
    uint32_t *ids = NULL;
    size_t n, bytes;
    choir_status status;
    CHOIR_TRY_TO(done, status, open_tokenizer(arguments->positional[0], &file, &t));
    if (v->file != NULL)
        CHOIR_TRY_TO(done, status, choir_file_read(v->file, MAX_TEXT_BYTES, &owned, &bytes));
    const char *list = owned != NULL ? owned : arguments->positional[1];
    CHOIR_TRY_TO(done, status,
                 choir_cli_parse_ids(v->file != NULL ? v->file : "IDS", list,
                                     choir_tokenizer_n_ids(t), &ids, &n));
    CHOIR_TRY_TO(done, status, choir_tokenizer_decode(t, ids, n, v->no_special, &text, &bytes));
    if (v->json) {
        choir_cli_print_json(json_pack("{s:s%}", "text", text, bytes), false);
    } else {
        fwrite(text, 1, bytes, stdout);
        putchar('\n');
    }
done:
    choir_free(text);
    choir_free(ids);
    choir_free(owned);
    choir_tokenizer_destroy(t);
    choir_model_file_close(file);
    return status;
}

const choir_verb choir_verb_tokenize = {
    .name = "tokenize",
    .arguments = "MODEL (TEXT | --file FILE) [--json]",
    .summary = "text to exact token ids",
    .example = "choir tokenize SmolLM2-135M-Instruct.Q4_1 'Hello world' --json",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 2,
    .check = check,
    .run = run_tokenize,
};

static const choir_option detokenize_options[] = {
    {"file", 'f', CHOIR_OPTION_TEXT, offsetof(values, file), "FILE", "the ids instead of IDS", 0,
     0},
    {"json", 0, CHOIR_OPTION_FLAG, offsetof(values, json), NULL, "one JSON object", 0, 0},
    {"no-special", 0, CHOIR_OPTION_FLAG, offsetof(values, no_special), NULL,
     "special tokens are left out of the text", 0, 0},
};

const choir_verb choir_verb_detokenize = {
    .name = "detokenize",
    .arguments = "MODEL (IDS | --file FILE) [--json]",
    .summary = "token ids to text",
    .example = "choir detokenize SmolLM2-135M-Instruct.Q4_1 19556,905",
    .options = detokenize_options,
    .n_options = sizeof detokenize_options / sizeof *detokenize_options,
    .defaults = &defaults,
    .values_bytes = sizeof(values),
    .min_positional = 1,
    .max_positional = 2,
    .check = check,
    .run = run_detokenize,
};
