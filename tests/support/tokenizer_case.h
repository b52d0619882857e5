/* WHAT    A tokenizer of tests/fixtures/tokenizer/cases: the parts of a tokenizer.json and the name
 *         of its BPE model, put together.
 * OWNS    Nothing; the caller frees.
 * THREADS Any.
 * ERRORS  A fixture that is missing or broken stops the process.
 * LIMITS  `root` is the folder tests/fixtures/tokenizer.
 * NEXT    tests/oracle/make_tokenizers.py, which writes the fixtures */
#pragma once
#include "engine/tokenizer.h"

#include <jansson.h>

/* The whole tokenizer.json of an opened case; free()d by the caller. */
char *tokenizer_case_json(const char *root, json_t *one);
choir_tokenizer *tokenizer_case_open(const char *root, const char *name);
