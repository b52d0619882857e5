#include "base/progress.h"

#include "base/clock.h"
#include "tests/base/test.h"

#include <fcntl.h>
#include <unistd.h>

static uint64_t fake_now;
static uint64_t read_fake(void *user)
{
    (void)user;
    return fake_now;
}

static int saved_stderr;
static char captured[4096];

static void begin_capture(void)
{
    fflush(stderr);
    saved_stderr = dup(STDERR_FILENO);
    FILE *file = tmpfile();
    assert_non_null(file);
    dup2(fileno(file), STDERR_FILENO);
    fclose(file);
}

static const char *end_capture(void)
{
    fflush(stderr);
    ssize_t n = pread(STDERR_FILENO, captured, sizeof captured - 1, 0);
    captured[n > 0 ? n : 0] = '\0';
    dup2(saved_stderr, STDERR_FILENO);
    close(saved_stderr);
    return captured;
}

static void test_lines_come_every_five_seconds(void **state)
{
    (void)state;
    choir_progress p;
    fake_now = CHOIR_SECOND;
    choir_clock_replace(read_fake, NULL);
    begin_capture();
    choir_progress_begin(&p, "loading", CHOIR_PROGRESS_BYTES, 100 << 20);
    for (uint64_t i = 1; i <= 10; i++) {
        fake_now += CHOIR_SECOND;
        choir_progress_update(&p, i * 10 << 20);
    }
    choir_progress_end(&p);
    const char *text = end_capture();
    choir_clock_replace(NULL, NULL);
    assert_string_equal(text, "loading: 50.0 MiB of 100 MiB, 5 s left\n"
                              "loading: 100 MiB of 100 MiB, 0 s left\n"
                              "loading: 100 MiB in 10.0 s\n");
}

static void test_short_or_quiet_work_says_nothing(void **state)
{
    (void)state;
    choir_progress p;
    choir_clock_replace(read_fake, NULL);
    begin_capture();
    choir_progress_begin(&p, "short", CHOIR_PROGRESS_ITEMS, 0);
    choir_progress_update(&p, 0);
    choir_progress_end(&p);
    choir_progress_begin(&p, "quiet", CHOIR_PROGRESS_ITEMS, 10);
    p.quiet = true;
    fake_now += 60 * CHOIR_SECOND;
    choir_progress_update(&p, 5);
    choir_progress_end(&p);
    const char *text = end_capture();
    choir_clock_replace(NULL, NULL);
    assert_string_equal(text, "");
}

static void test_bytes_for_people(void **state)
{
    (void)state;
    char out[16];
    assert_string_equal(choir_format_bytes(0, out), "0 B");
    assert_string_equal(choir_format_bytes(1023, out), "1023 B");
    assert_string_equal(choir_format_bytes(1536, out), "1.5 KiB");
    assert_string_equal(choir_format_bytes((uint64_t)34 << 20, out), "34.0 MiB");
    assert_string_equal(choir_format_bytes((uint64_t)120 << 30, out), "120 GiB");
    assert_string_equal(choir_format_bytes(UINT64_MAX, out), "16.0 EiB");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lines_come_every_five_seconds),
        cmocka_unit_test(test_short_or_quiet_work_says_nothing),
        cmocka_unit_test(test_bytes_for_people),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
