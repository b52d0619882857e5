#include "server/reflection.h"

#include "base/memory.h"
#include "proto/proto.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
// cmocka wants the four headers above first
#include <cmocka.h>

typedef Grpc__Reflection__V1__ServerReflectionRequest request_type;
typedef Grpc__Reflection__V1__ServerReflectionResponse response_type;

static size_t set_bytes(void)
{
    return (size_t)(choir_proto_descriptors_end - choir_proto_descriptors);
}

static response_type *ask(const choir_reflection *r, const request_type *request)
{
    uint8_t data[2048], *answer = NULL;
    size_t n = protobuf_c_message_pack(&request->base, data), bytes = 0;
    assert_int_equal(choir_reflection_answer(r, data, n, &answer, &bytes), CHOIR_OK);
    response_type *read =
        grpc__reflection__v1__server_reflection_response__unpack(NULL, bytes, answer);
    choir_free(answer);
    assert_non_null(read);
    return read;
}

static int answer_to_symbol(const choir_reflection *r, const char *symbol)
{
    request_type request = GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.message_request_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL;
    request.file_containing_symbol = (char *)symbol;
    response_type *response = ask(r, &request);
    int kind = (int)response->message_response_case;
    grpc__reflection__v1__server_reflection_response__free_unpacked(response, NULL);
    return kind;
}

static void knows_every_symbol(void **state)
{
    (void)state;
    choir_reflection *r = NULL;
    assert_int_equal(choir_reflection_create(choir_proto_descriptors, set_bytes(), &r), CHOIR_OK);
    static const char *const known[] = {"choir.v1.Choir",
                                        "choir.v1.Choir.Generate",
                                        "choir.v1.GenerateRequest",
                                        "choir.v1.GenerateRequest.prompt",
                                        "choir.v1.GenerateRequest.input",
                                        "choir.v1.Sampling.LogitBiasEntry",
                                        "choir.v1.Thumb",
                                        "choir.v1.UP",
                                        "grpc.health.v1.HealthCheckResponse.ServingStatus",
                                        "grpc.health.v1.HealthCheckResponse.SERVING",
                                        "grpc.reflection.v1alpha.ServerReflection"};
    static const char *const unknown[] = {
        "", "choir", "choir.v1", "choir.v1.Choir.", "x", "choir.v1.Thumb.UP"};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        assert_int_equal(
            answer_to_symbol(r, known[i]),
            GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE);
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++)
        assert_int_equal(
            answer_to_symbol(r, unknown[i]),
            GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE);
    choir_reflection_destroy(r);
}

static void refuses_bad_requests(void **state)
{
    (void)state;
    choir_reflection *r = NULL;
    assert_int_equal(choir_reflection_create(choir_proto_descriptors, set_bytes(), &r), CHOIR_OK);
    uint8_t *answer;
    size_t bytes;
    static const uint8_t bad[][4] = {{0x22, 2, 0xFF, 0xFF}, {0x22, 1, 0, 0}, {0x22, 9, 'a', 'b'}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(choir_reflection_answer(r, bad[i], 4, &answer, &bytes), CHOIR_E_INVALID);
    choir_reflection_destroy(r);
}

static void survives_failing_memory(void **state)
{
    (void)state;
    static const uint8_t list[] = {0x3A, 0};
    choir_status status = CHOIR_E_NO_MEMORY;
    for (uint64_t i = 1; status != CHOIR_OK; i++) {
        choir_reflection *r = NULL;
        uint8_t *answer = NULL;
        size_t bytes;
        choir_memory_fail_at(i);
        status = choir_reflection_create(choir_proto_descriptors, set_bytes(), &r);
        if (status == CHOIR_OK)
            status = choir_reflection_answer(r, list, sizeof list, &answer, &bytes);
        choir_memory_fail_at(0);
        assert_true(status == CHOIR_OK || status == CHOIR_E_NO_MEMORY);
        choir_free(answer);
        choir_reflection_destroy(r);
    }
}

static void refuses_damaged_descriptors(void **state)
{
    (void)state;
    choir_reflection *r = NULL;
    assert_int_equal(choir_reflection_create(choir_proto_descriptors, 100, &r), CHOIR_E_INTERNAL);
    assert_int_equal(choir_reflection_create(choir_proto_descriptors, 0, &r), CHOIR_E_INTERNAL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(knows_every_symbol),
        cmocka_unit_test(refuses_bad_requests),
        cmocka_unit_test(survives_failing_memory),
        cmocka_unit_test(refuses_damaged_descriptors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
