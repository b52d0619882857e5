#include "base/error.h"

#include "tests/base/test.h"

#include <errno.h>
#include <pthread.h>

static void test_sentence_keeps_errno(void **state)
{
    (void)state;
    errno = ENOENT;
    assert_int_equal(choir_fail(CHOIR_E_IO, "cannot open %s: %m", "x"), CHOIR_E_IO);
    assert_string_equal(choir_error_message(), "cannot open x: No such file or directory");
    assert_int_equal(errno, ENOENT);
}

static void test_context_goes_before(void **state)
{
    (void)state;
    choir_status status = choir_fail(CHOIR_E_FORMAT, "field a is 3");
    assert_int_equal(choir_fail_in(status, "file %d", 7), CHOIR_E_FORMAT);
    assert_string_equal(choir_error_message(), "file 7: field a is 3");
    /* The sentence may be its own argument. */
    choir_status again = choir_fail(CHOIR_E_IO, "(%s)", choir_error_message());
    assert_int_equal(again, CHOIR_E_IO);
    assert_string_equal(choir_error_message(), "(file 7: field a is 3)");
    choir_error_clear();
    assert_string_equal(choir_error_message(), "");
}

/* A sentence that is too long is cut between characters, whatever their width and place. */
static void test_long_sentences_are_cut_on_characters(void **state)
{
    (void)state;
    static const char *const wide[] = {"é", "€", "😀"};
    for (int w = 0; w < 3; w++)
        for (int shift = 0; shift < 4; shift++) {
            char text[2048] = "";
            memset(text, 'a', (size_t)shift);
            while (strlen(text) < 1500) strcat(text, wide[w]);
            choir_status status = choir_fail(CHOIR_E_INVALID, "%s", text);
            assert_int_equal(status, CHOIR_E_INVALID);
            size_t n = strlen(choir_error_message());
            assert_true(n <= 1023 && n > 1018);
            assert_int_equal((n - (size_t)shift) % strlen(wide[w]), 0);
        }
}

/* Names out of files go to clients, who take nothing but UTF-8. */
static void test_sentences_are_utf8(void **state)
{
    (void)state;
    static const struct {
        const char *name, *expected;
    } cases[] = {
        {"é€😀", "here é€😀 ends"},          {"\xff\xfe", "here ?? ends"},
        {"a\xc3", "here a? ends"},         {"\xe2\x82z", "here ??z ends"},
        {"\xed\xa0\x80", "here ??? ends"}, {"\xc0\xaf", "here ?? ends"},
        {"\x80", "here ? ends"},           {"\xf4\x90\x80\x80", "here ???? ends"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        choir_status status = choir_fail(CHOIR_E_INVALID, "here %s ends", cases[i].name);
        assert_int_equal(status, CHOIR_E_INVALID);
        assert_string_equal(choir_error_message(), cases[i].expected);
    }
}

static void *fail_elsewhere(void *arg)
{
    (void)arg;
    choir_status status = choir_fail(CHOIR_E_IO, "another thread's");
    return (void *)(uintptr_t)status;
}

static void test_sentences_belong_to_threads(void **state)
{
    (void)state;
    pthread_t thread;
    choir_status status = choir_fail(CHOIR_E_FULL, "mine");
    assert_int_equal(pthread_create(&thread, NULL, fail_elsewhere, NULL), 0);
    pthread_join(thread, NULL);
    assert_int_equal(status, CHOIR_E_FULL);
    assert_string_equal(choir_error_message(), "mine");
}

static void test_every_status_has_text_and_code(void **state)
{
    (void)state;
    assert_string_equal(choir_status_text(CHOIR_OK), "ok");
    assert_int_equal(choir_status_grpc(CHOIR_OK), 0);
    assert_int_equal(choir_status_grpc(CHOIR_E_INVALID), 3);
    assert_int_equal(choir_status_grpc(CHOIR_E_DATA_LOSS), 15);
    for (int s = 1; s <= CHOIR_E_UNAUTHENTICATED; s++) {
        assert_true(strlen(choir_status_text((choir_status)s)) > 3);
        assert_in_range(choir_status_grpc((choir_status)s), 1, 16);
    }
    assert_string_equal(choir_status_text((choir_status)999), "unknown");
    assert_int_equal(choir_status_grpc((choir_status)999), 13);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sentence_keeps_errno),
        cmocka_unit_test(test_context_goes_before),
        cmocka_unit_test(test_long_sentences_are_cut_on_characters),
        cmocka_unit_test(test_sentences_are_utf8),
        cmocka_unit_test(test_sentences_belong_to_threads),
        cmocka_unit_test(test_every_status_has_text_and_code),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
