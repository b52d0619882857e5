#include "server/wire.h"

#include "proto/proto.h"
#include "server/generate_request.h"
#include "server/message.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
// cmocka wants the four headers above first
#include <cmocka.h>

static const ProtobufCMessageDescriptor *const generate = &choir__v1__generate_request__descriptor;

static choir_status check(const void *data, size_t bytes)
{
    return choir_wire_check(generate, choir_request_rules, choir_n_request_rules, data, bytes);
}

static void refuses(const void *data, size_t bytes, const char *words)
{
    assert_int_equal(check(data, bytes), CHOIR_E_INVALID);
    if (strstr(choir_error_message(), words) == NULL)
        fail_msg("\"%s\" does not say \"%s\"", choir_error_message(), words);
}
#define REFUSES(text, words) refuses(text, sizeof(text) - 1, words)

static void takes_what_protobuf_packs(void **state)
{
    (void)state;
    Choir__V1__GenerateRequest request = CHOIR__V1__GENERATE_REQUEST__INIT;
    Choir__V1__Sampling sampling = CHOIR__V1__SAMPLING__INIT;
    char *stops[] = {"one", "zwei", "\xE4\xB8\x89"};
    uint32_t ids[] = {1, 200, 4000000000u};
    sampling.n_stop = 3;
    sampling.stop = stops;
    sampling.n_stop_token_ids = 3;
    sampling.stop_token_ids = ids;
    sampling._temperature_case = CHOIR__V1__SAMPLING___TEMPERATURE_TEMPERATURE;
    sampling.temperature = 0.5f;
    request.input_case = CHOIR__V1__GENERATE_REQUEST__INPUT_PROMPT;
    request.prompt = "na\xC3\xAFve";
    request.sampling = &sampling;
    uint8_t data[256];
    size_t n = protobuf_c_message_pack(&request.base, data);
    assert_int_equal(check(data, n), CHOIR_OK);
    for (size_t cut = 1; cut < n; cut++) {
        ProtobufCMessage *read = NULL;
        choir_status status = choir_message_read(generate, choir_request_rules,
                                                 choir_n_request_rules, data, cut, &read);
        assert_true(status == CHOIR_OK || status == CHOIR_E_INVALID);
        if (status == CHOIR_OK) choir_message_free(read);
    }
}

static void refuses_bad_structure(void **state)
{
    (void)state;
    REFUSES("\x1a", "well-formed");
    REFUSES("\x1a\x05"
            "ab",
            "well-formed");
    REFUSES("\x1a\xff\xff\xff\xff\x7f", "well-formed"); /* a length beyond 32 bits */
    REFUSES("\x1b\x1c", "well-formed");                 /* a group */
    REFUSES("\x02\x00", "well-formed");                 /* field 0 */
    REFUSES("\x60\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "well-formed");
    REFUSES("\x18\x01", "prompt has the wrong wire type");
    REFUSES("\x32\x02\x0d\x00", "sampling is not a well-formed message");
    REFUSES("\x32\x00\x32\x00", "sampling appears twice");
    REFUSES("\x22\x03\x0a\x01\xff", "tokens.ids is not well-formed");
}

static void refuses_bad_text(void **state)
{
    (void)state;
    REFUSES("\x1a\x03"
            "a\0b",
            "prompt contains a NUL");
    REFUSES("\x1a\x02"
            "a\xff",
            "prompt is not valid UTF-8");
    REFUSES("\x2a\x07\x0a\x05\x0a\x01u\x12\x00\x2a\x07\x0a\x05\x0a\x01u\x12\x00",
            "chat appears twice");
    REFUSES("\x2a\x08\x0a\x06\x0a\x01u\x12\x01\x80", "chat.messages[0].content is not valid UTF-8");
}

static void bounds_counts_before_copying(void **state)
{
    (void)state;
    uint8_t data[64 * 1024];
    size_t n = 0, inner = 0;
    uint8_t sampling[1024];
    for (int i = 0; i < 17; i++) { /* 17 stops */
        sampling[inner++] = 11 << 3 | 2;
        sampling[inner++] = 1;
        sampling[inner++] = 'x';
    }
    n += choir_wire_put_header(data, 6, inner);
    memcpy(data + n, sampling, inner);
    refuses(data, n + inner, "sampling.stop has more than 16 entries");
    n = choir_wire_put_header(data, 1, 129);
    memset(data + n, 'x', 129);
    refuses(data, n + 129, "request_id has 129 bytes; the limit is 128");
}

static void bounds_the_number_of_fields(void **state)
{
    (void)state;
    size_t n = 2 * (size_t)(CHOIR_WIRE_MAX_FIELDS + 1);
    uint8_t *data = malloc(n);
    for (size_t i = 0; i < n; i += 2) {
        data[i] = 12 << 3; /* priority, again and again */
        data[i + 1] = 1;
    }
    assert_int_equal(check(data, n - 2), CHOIR_OK);
    refuses(data, n, "more than 262144 fields");
    free(data);
}

static void knows_utf8(void **state)
{
    (void)state;
    static const char *const good[] = {"",
                                       "a",
                                       "abcdefgh\xC3\xA9",
                                       "\xE2\x98\x95",
                                       "\xF0\x9F\x98\x80",
                                       "\xED\x9F\xBF",
                                       "\xEE\x80\x80",
                                       "\xF4\x8F\xBF\xBF",
                                       "\xC2\x80"};
    static const char *const bad[] = {"\x80",
                                      "\xC3",
                                      "\xC0\x80",
                                      "\xC1\xBF",
                                      "\xE0\x9F\xBF",
                                      "\xED\xA0\x80",
                                      "\xF0\x8F\xBF\xBF",
                                      "\xF4\x90\x80\x80",
                                      "\xFF",
                                      "\xF5\x80\x80\x80",
                                      "abcdefgh\xE2\x98",
                                      "\xE2\x28\xA1"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_true(choir_utf8_valid(good[i], strlen(good[i])));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(choir_utf8_valid(bad[i], strlen(bad[i])));
}

static void text_behind_a_message_keeps_its_nul(void **state)
{
    (void)state;
    Choir__V1__DetokenizeResponse response = CHOIR__V1__DETOKENIZE_RESPONSE__INIT;
    grpc_slice slice = choir_message_pack_with_text(&response.base, 1, "a\0b", 3);
    static const uint8_t want[] = {0x0A, 3, 'a', 0, 'b'};
    assert_int_equal(GRPC_SLICE_LENGTH(slice), sizeof want);
    assert_memory_equal(GRPC_SLICE_START_PTR(slice), want, sizeof want);
    grpc_slice_unref(slice);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(takes_what_protobuf_packs),
        cmocka_unit_test(refuses_bad_structure),
        cmocka_unit_test(refuses_bad_text),
        cmocka_unit_test(bounds_counts_before_copying),
        cmocka_unit_test(bounds_the_number_of_fields),
        cmocka_unit_test(knows_utf8),
        cmocka_unit_test(text_behind_a_message_keeps_its_nul),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
