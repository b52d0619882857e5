#include "engine/chat_variables.h"

static int set_token(json_t *variables, const char *name, const choir_tokenizer *tokenizer,
                     int32_t id)
{
    size_t bytes;
    const char *piece = id < 0 ? NULL : choir_tokenizer_piece(tokenizer, (uint32_t)id, &bytes);
    if (piece != NULL) return json_object_set_new(variables, name, json_stringn(piece, bytes));
    json_object_del(variables, name); /* a client's own would be taken for the model's */
    return 0;
}

choir_status choir_chat_variables_set(json_t *variables, const choir_tokenizer *tokenizer,
                                      bool add_generation_prompt)
{
    json_t *absent = json_pack("{s:n, s:n}", "tools", "documents");
    int failed = absent == NULL || json_object_update_missing(variables, absent) != 0;
    json_decref(absent);
    failed |= json_object_set_new(variables, "add_generation_prompt",
                                  json_boolean(add_generation_prompt));
    failed |= set_token(variables, "bos_token", tokenizer, choir_tokenizer_bos(tokenizer));
    failed |= set_token(variables, "eos_token", tokenizer, choir_tokenizer_eos(tokenizer));
    return failed ? choir_fail(CHOIR_E_NO_MEMORY, "no memory for the conversation") : CHOIR_OK;
}
