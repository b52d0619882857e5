/* WHAT    PEFT's rank_pattern and alpha_pattern: numbers for modules that regular expressions fit.
 * OWNS    A list: its compiled expressions, until free.
 * THREADS One.
 * ERRORS  CHOIR_E_FORMAT (no number, no expression), CHOIR_E_INVALID (a match takes too long).
 * LIMITS  The steps of a match, and of all matches of a list, are bounded: a file is hostile.
 * NEXT    engine/adapter_lora.c */
#pragma once
#include "engine/adapter_read.h"

typedef struct choir_adapter_patterns choir_adapter_patterns;

/* Of a key of the configuration, an object or null. *out, NULL where there are none, is to be freed
 * also where it fails. */
choir_status choir_adapter_patterns_make(const choir_adapter_reader *reader, const char *key,
                                         choir_adapter_patterns **out) CHOIR_MUST_USE;
/* Of a key that is one expression, which must fit a module's whole name, as re.fullmatch does; its
 * number is 1. */
choir_status choir_adapter_pattern_whole(const choir_adapter_reader *reader, const char *key,
                                         choir_adapter_patterns **out) CHOIR_MUST_USE;
/* The number of the first expression that fits the module, as re.match(r"(.*\.)?(KEY)$") fits it;
 * *out is left as it is where none does. */
choir_status choir_adapter_patterns_find(const choir_adapter_reader *reader,
                                         choir_adapter_patterns *patterns, const char *module,
                                         double *out) CHOIR_MUST_USE;
void choir_adapter_patterns_free(choir_adapter_patterns *patterns);
