/* The bytes of a GenerateRequest: checked, unpacked and resolved against a small model, or refused.
 * What the wire check passes must unpack. */
#include "server/generate_request.h"
#include "server/message.h"
#include "server/reflection.h"

#include <stdlib.h>

static choir_model_config config = {
    .vocab = 300, .max_positions = 4096, .bos_id = -1, .pad_id = -1};
static choir_reflection *reflection;

static void setup(void)
{
    size_t bytes = (size_t)(choir_proto_descriptors_end - choir_proto_descriptors);
    if (choir_reflection_create(choir_proto_descriptors, bytes, &reflection) != CHOIR_OK) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    if (reflection == NULL) setup();
    choir_server_model model = {.name = "fuzz", .config = &config};
    choir_generate_request r = {0};
    choir_status status = choir_generate_request_read(data, bytes, &r);
    CHOIR_ASSERT(status == CHOIR_OK || status == CHOIR_E_INVALID);
    /* Without a tokenizer only ids can be resolved; texts are the tokenizer's own fuzz target. */
    if (status == CHOIR_OK && r.message->input_case == CHOIR__V1__GENERATE_REQUEST__INPUT_TOKENS) {
        status = choir_generate_request_resolve(&r, &model);
        CHOIR_ASSERT(status != CHOIR_E_INTERNAL && status != CHOIR_E_NO_MEMORY);
    }
    choir_generate_request_free(&r);
    uint8_t *answer = NULL;
    size_t answer_bytes;
    if (choir_reflection_answer(reflection, data, bytes, &answer, &answer_bytes) == CHOIR_OK)
        choir_free(answer);
    return 0;
}
