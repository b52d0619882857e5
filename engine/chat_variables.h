/* WHAT    What every chat template is given beside the messages, as transformers' apply_chat_template does.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  CHOIR_E_NO_MEMORY.
 * NEXT    engine/chat_template.h */
#pragma once
#include "engine/tokenizer.h"
#include <jansson.h>

/* Sets add_generation_prompt and the bos_token and eos_token that the tokenizer has; tools and documents
 * become null unless they are there. */
choir_status choir_chat_variables_set(json_t *variables, const choir_tokenizer *tokenizer,
                                      bool add_generation_prompt) CHOIR_MUST_USE;
