/* The bytes of a GenerateRequest: checked, unpacked and resolved against a small model, or refused;
 * then the same bytes as the adapters' requests. What the wire check passes must unpack. */
#include "server/generate_request.h"
#include "server/message.h"
#include "server/reflection.h"

#include <stdlib.h>
#include <string.h>

static choir_model_config config = {
    .vocab = 300, .max_positions = 4096, .bos_id = -1, .pad_id = -1};
static choir_reflection *reflection;

static void setup(void)
{
    size_t bytes = (size_t)(choir_proto_descriptors_end - choir_proto_descriptors);
    if (choir_reflection_create(choir_proto_descriptors, bytes, &reflection) != CHOIR_OK) abort();
}

static void read_admin(const uint8_t *data, size_t bytes)
{
    const ProtobufCMessageDescriptor *const types[] = {
        &choir__v1__load_adapter_request__descriptor,
        &choir__v1__unload_adapter_request__descriptor,
        &choir__v1__list_adapters_request__descriptor};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        ProtobufCMessage *message = NULL;
        choir_status status = choir_message_read(types[i], choir_request_rules,
                                                 choir_n_request_rules, data, bytes, &message);
        CHOIR_ASSERT(status == CHOIR_OK || status == CHOIR_E_INVALID);
        if (status == CHOIR_OK && i == 0) {
            const char *name = ((const Choir__V1__LoadAdapterRequest *)message)->name;
            bool good = choir_adapters_check_name(name) == CHOIR_OK;
            /* Names become no paths, but they look like ones. */
            CHOIR_ASSERT(!good || (name[0] != '/' && name[0] != '.' && strstr(name, "..") == NULL));
        }
        choir_message_free(message);
    }
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
    read_admin(data, bytes);
    uint8_t *answer = NULL;
    size_t answer_bytes;
    if (choir_reflection_answer(reflection, data, bytes, &answer, &answer_bytes) == CHOIR_OK)
        choir_free(answer);
    return 0;
}
