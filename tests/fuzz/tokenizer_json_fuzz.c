/* Any bytes as a tokenizer.json: loaded or refused; what is loaded encodes and decodes nasty texts.
 */
#include "tokenizer_check.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    choir_tokenizer *t;
    choir_status status = choir_tokenizer_parse_json((const char *)data, bytes, &t);
    if (status != CHOIR_OK) {
        check_refusal(status);
        return 0;
    }
    check_nasty_texts(t);
    check_every_id(t);
    choir_tokenizer_destroy(t);
    return 0;
}
