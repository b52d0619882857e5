#include "server/generate_request.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
// cmocka wants the four headers above first
#include <cmocka.h>

static choir_tokenizer *tokenizer;
static choir_chat_template *chat_template;
static choir_model_config config = {.vocab = 265,
                                    .max_positions = 64,
                                    .n_eos = 2,
                                    .eos_ids = {256, 258},
                                    .bos_id = -1,
                                    .pad_id = -1,
                                    .temperature = 0.7f,
                                    .top_k = 40};
static choir_server_model model = {.name = "tiny", .config = &config};

static int set_up(void **state)
{
    (void)state;
    static const char source[] = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                                 "{% if tools %}{{ tools | length }}{% endif %}"
                                 "{% if documents is not none %}!{% endif %}"
                                 "{% if add_generation_prompt %}>{% endif %}{{ style }}";
    char *json;
    size_t bytes;
    if (choir_file_read("tests/fixtures/server/tokenizer.json", 1 << 20, &json, &bytes) != CHOIR_OK)
        return 1;
    choir_status status = choir_tokenizer_parse_json(json, bytes, &tokenizer);
    choir_free(json);
    if (status == CHOIR_OK)
        status = choir_chat_template_compile(source, sizeof source - 1, &chat_template);
    model.tokenizer = tokenizer;
    model.chat_template = chat_template;
    return status == CHOIR_OK ? 0 : 1;
}

static int tear_down(void **state)
{
    (void)state;
    choir_chat_template_destroy(chat_template);
    choir_tokenizer_destroy(tokenizer);
    return 0;
}

/* Packs, reads, resolves. */
static choir_status make(const Choir__V1__GenerateRequest *request, choir_generate_request *out)
{
    uint8_t data[4096];
    size_t n = protobuf_c_message_pack(&request->base, data);
    CHOIR_TRY(choir_generate_request_read(data, n, out));
    return choir_generate_request_resolve(out, &model);
}

static Choir__V1__GenerateRequest prompt(const char *text)
{
    Choir__V1__GenerateRequest request = CHOIR__V1__GENERATE_REQUEST__INIT;
    request.input_case = CHOIR__V1__GENERATE_REQUEST__INPUT_PROMPT;
    request.prompt = (char *)text;
    return request;
}

static void left_out_means_the_models_own(void **state)
{
    (void)state;
    Choir__V1__GenerateRequest request = prompt("abc");
    choir_generate_request r;
    assert_int_equal(make(&request, &r), CHOIR_OK);
    assert_float_equal(r.request.sampling.temperature, 0.7f, 0);
    assert_int_equal(r.request.sampling.top_k, 40);
    assert_float_equal(r.request.sampling.top_p, 1, 0);
    assert_int_equal(r.request.n, 1);
    assert_int_equal(r.request.max_tokens, 0);
    assert_true(r.request.skip_special);
    assert_false(r.request.want_logprobs);
    assert_int_equal(r.request.n_stop_ids, 0); /* the model's own ends are the scheduler's matter */
    assert_int_equal(r.request.n_tokens, 3);
    assert_int_equal(r.request.tokens[2], 'c');
    choir_generate_request_free(&r);
}

static void said_is_taken(void **state)
{
    (void)state;
    Choir__V1__GenerateRequest request = prompt("abc");
    Choir__V1__Sampling sampling = CHOIR__V1__SAMPLING__INIT;
    uint32_t ids[] = {5};
    sampling.temperature = 0;
    sampling.seed = 42;
    sampling.ignore_eos = true;
    sampling.n_stop_token_ids = 1;
    sampling.stop_token_ids = ids;
    request.sampling = &sampling;
    request.priority = -7;
    request.request_id = "me";
    choir_generate_request r;
    sampling._temperature_case = CHOIR__V1__SAMPLING___TEMPERATURE_TEMPERATURE;
    sampling._seed_case = CHOIR__V1__SAMPLING___SEED_SEED;
    sampling._ignore_eos_case = CHOIR__V1__SAMPLING___IGNORE_EOS_IGNORE_EOS;
    sampling._logprobs_case = CHOIR__V1__SAMPLING___LOGPROBS_LOGPROBS;
    sampling._skip_special_tokens_case =
        CHOIR__V1__SAMPLING___SKIP_SPECIAL_TOKENS_SKIP_SPECIAL_TOKENS;
    assert_int_equal(make(&request, &r), CHOIR_OK);
    assert_float_equal(r.request.sampling.temperature, 0, 0);
    assert_int_equal(r.request.sampling.seed, 42);
    assert_true(r.request.ignore_eos && r.request.want_logprobs && !r.request.skip_special);
    assert_int_equal(r.request.n_stop_ids, 1);
    assert_int_equal(r.request.priority, -7);
    assert_string_equal(r.id, "me");
    choir_generate_request_free(&r);
}

static void chats_go_through_the_template(void **state)
{
    (void)state;
    Choir__V1__GenerateRequest request = CHOIR__V1__GENERATE_REQUEST__INIT;
    Choir__V1__Chat chat = CHOIR__V1__CHAT__INIT;
    Choir__V1__ChatMessage message = CHOIR__V1__CHAT_MESSAGE__INIT, *list[] = {&message};
    message.role = "user";
    message.content = "hi";
    chat.n_messages = 1;
    chat.messages = list;
    chat.tools_json = "[{\"name\": \"a\"}, {}]";
    chat.variables_json = "{\"style\": \"!\", \"messages\": []}";
    request.input_case = CHOIR__V1__GENERATE_REQUEST__INPUT_CHAT;
    request.chat = &chat;
    choir_generate_request r;
    static const char want[] = "[user]hi2>!";
    assert_int_equal(make(&request, &r), CHOIR_OK);
    assert_int_equal(r.request.n_tokens, sizeof want - 1);
    for (size_t i = 0; i < sizeof want - 1; i++) assert_int_equal(r.request.tokens[i], want[i]);
    choir_generate_request_free(&r);
    model.chat_template = NULL;
    assert_int_equal(make(&request, &r), CHOIR_E_PRECONDITION);
    choir_generate_request_free(&r);
    model.chat_template = chat_template;
}

static void survives_failing_memory(void **state)
{
    (void)state;
    Choir__V1__GenerateRequest request = prompt("abc");
    Choir__V1__Sampling sampling = CHOIR__V1__SAMPLING__INIT;
    Choir__V1__Sampling__LogitBiasEntry bias = CHOIR__V1__SAMPLING__LOGIT_BIAS_ENTRY__INIT;
    Choir__V1__Sampling__LogitBiasEntry *entries[] = {&bias};
    char *stops[] = {"x", "y"};
    sampling.n_logit_bias = 1;
    sampling.logit_bias = entries;
    sampling.n_stop = 2;
    sampling.stop = stops;
    request.sampling = &sampling;
    choir_status status = CHOIR_E_NO_MEMORY;
    for (uint64_t i = 1; status != CHOIR_OK; i++) {
        choir_generate_request r = {0};
        choir_memory_fail_at(i);
        status = make(&request, &r);
        choir_memory_fail_at(0);
        assert_true(status == CHOIR_OK || status == CHOIR_E_NO_MEMORY);
        choir_generate_request_free(&r);
        assert_true(i < 1000);
    }
}

static void a_prompt_must_leave_room(void **state)
{
    (void)state;
    char text[128];
    memset(text, 'x', sizeof text);
    choir_generate_request r;
    for (size_t n = 63; n < 66; n++) {
        text[n] = '\0';
        Choir__V1__GenerateRequest request = prompt(text);
        assert_int_equal(make(&request, &r), n < 64 ? CHOIR_OK : CHOIR_E_INVALID);
        if (n >= 64) assert_non_null(strstr(choir_error_message(), "64"));
        choir_generate_request_free(&r);
        text[n] = 'x';
    }
}

/* A mix of n adapters named a, b, …, all of one weight. */
static void fill_mix(Choir__V1__GenerateRequest *request, Choir__V1__AdapterWeight *list,
                     Choir__V1__AdapterWeight **pointers, size_t n, float weight)
{
    static const char *const names[] = {"a", "b", "c", "d", "e", "f", "g", "h", "i"};
    for (size_t i = 0; i < n; i++) {
        choir__v1__adapter_weight__init(&list[i]);
        list[i].adapter = (char *)names[i];
        list[i].weight = weight;
        pointers[i] = &list[i];
    }
    request->n_mix = n;
    request->mix = pointers;
}

static void adapters_are_taken(void **state)
{
    (void)state;
    Choir__V1__AdapterWeight list[CHOIR_MAX_MIX], *pointers[CHOIR_MAX_MIX];
    Choir__V1__GenerateRequest request = prompt("abc");
    choir_generate_request r;
    request.adapting_case = CHOIR__V1__GENERATE_REQUEST__ADAPTING_ADAPTER;
    request.adapter = "french";
    assert_int_equal(make(&request, &r), CHOIR_OK);
    assert_int_equal(r.request.n_adapters, 1);
    assert_string_equal(r.request.adapters[0].name, "french");
    assert_float_equal(r.request.adapters[0].weight, 1, 0);
    choir_generate_request_free(&r);
    request.adapter = "";
    assert_int_equal(make(&request, &r), CHOIR_OK);
    assert_int_equal(r.request.n_adapters, 0);
    choir_generate_request_free(&r);
    fill_mix(&request, list, pointers, CHOIR_MAX_MIX, -8);
    list[1].weight = 0.25F;
    assert_int_equal(make(&request, &r), CHOIR_OK);
    assert_int_equal(r.request.n_adapters, CHOIR_MAX_MIX);
    assert_string_equal(r.request.adapters[7].name, "h");
    assert_float_equal(r.request.adapters[7].weight, -8, 0);
    assert_float_equal(r.request.adapters[1].weight, 0.25F, 0);
    choir_generate_request_free(&r);
}

static void bad_mixes_are_refused(void **state)
{
    (void)state;
    enum { TOO_MANY = CHOIR_MAX_MIX + 1 };
    static const struct {
        size_t n;
        float weight;
        const char *second, *adapter, *says;
    } cases[] = {
        {TOO_MANY, 1, NULL, NULL, "mix has more than 8"},
        {2, 8.5F, NULL, NULL, "mix[0].weight is 8.5; it is -8 to 8"},
        {2, -9, NULL, NULL, "mix[0].weight is -9; it is -8 to 8"},
        {2, (float)NAN, NULL, NULL, "nan; it is -8 to 8"},
        {2, (float)INFINITY, NULL, NULL, "mix[0].weight is inf"},
        {2, 1, "a", NULL, "mix[1].adapter is \"a\" as mix[0] has it"},
        {2, 1, "", NULL, "mix[1].adapter is empty; it has 1 to 256 bytes"},
        {1, 1, NULL, "x", "at most one of adapter, auto_adapter and mix"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Choir__V1__AdapterWeight list[TOO_MANY], *pointers[TOO_MANY];
        Choir__V1__GenerateRequest request = prompt("abc");
        choir_generate_request r = {0};
        fill_mix(&request, list, pointers, cases[i].n, cases[i].weight);
        if (cases[i].second != NULL) list[1].adapter = (char *)cases[i].second;
        if (cases[i].adapter != NULL) {
            request.adapting_case = CHOIR__V1__GENERATE_REQUEST__ADAPTING_ADAPTER;
            request.adapter = (char *)cases[i].adapter;
        }
        assert_int_equal(make(&request, &r), CHOIR_E_INVALID);
        assert_non_null(strstr(choir_error_message(), cases[i].says));
        choir_generate_request_free(&r);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(left_out_means_the_models_own), cmocka_unit_test(said_is_taken),
        cmocka_unit_test(chats_go_through_the_template), cmocka_unit_test(survives_failing_memory),
        cmocka_unit_test(a_prompt_must_leave_room),      cmocka_unit_test(adapters_are_taken),
        cmocka_unit_test(bad_mixes_are_refused),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
