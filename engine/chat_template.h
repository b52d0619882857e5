/* WHAT    A model's own Jinja chat template, rendered by a sandboxed interpreter of the subset that
 *         published templates use.
 * OWNS    The compiled template.
 * THREADS Rendering: any number at once (a render has its own arena).
 * ERRORS  CHOIR_E_FORMAT (a template that does not compile: line, what), CHOIR_E_INVALID (raise_exception
 *         and errors while rendering), CHOIR_E_FULL (a limit: which, its value).
 * LIMITS  Source 1 MiB, nesting 100, 4,000,000 steps, 16 MiB of output, 64 MiB of values; no files, no clock but strftime_now.
 * NEXT    scheduler/scheduler.h, which gets the rendered prompt's tokens. */
#pragma once
#include "base/error.h"
#include <jansson.h>

typedef struct choir_chat_template choir_chat_template;

choir_status choir_chat_template_compile(const char *source, size_t bytes, choir_chat_template **out)
    CHOIR_MUST_USE;
void choir_chat_template_destroy(choir_chat_template *chat_template);

/* variables: a JSON object with what templates read: messages, add_generation_prompt, bos_token,
 * eos_token, tools, … now_s: seconds since the epoch for strftime_now (UTC). *text is choir_free()d. */
choir_status choir_chat_template_render(const choir_chat_template *chat_template, const json_t *variables,
                                        int64_t now_s, char **text, size_t *bytes) CHOIR_MUST_USE;
