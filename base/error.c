#include "base/error.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

static _Thread_local char sentence[CHOIR_MAX_SENTENCE];

static const struct {
    const char *text;
    int grpc;
} errors[] = {
#define X(name, text, grpc) [CHOIR_##name] = {text, grpc},
    CHOIR_ERROR_LIST(X)
#undef X
};

/* Drops a UTF-8 character that vsnprintf cut in half at the end of the buffer. */
static void trim_cut_character(char *text)
{
    size_t n = strlen(text);
    size_t start = n;
    while (start > 0 && ((unsigned char)text[start - 1] & 0xC0) == 0x80) start--;
    if (start == 0) return;
    unsigned char lead = (unsigned char)text[start - 1];
    size_t want = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : lead >= 0xC0 ? 2 : 1;
    if (want > 1 && n - (start - 1) < want) text[start - 1] = '\0';
}

/* One byte that is no UTF-8 would cost a client the whole message. */
static void make_utf8(char *text)
{
    trim_cut_character(text);
    utf8proc_ssize_t n = (utf8proc_ssize_t)strlen(text);
    for (utf8proc_ssize_t i = 0; i < n;) {
        utf8proc_int32_t character;
        utf8proc_ssize_t bytes =
            utf8proc_iterate((const utf8proc_uint8_t *)text + i, n - i, &character);
        if (bytes <= 0) text[i] = '?';
        i += bytes > 0 ? bytes : 1;
    }
}

choir_status(choir_fail)(choir_status status, const char *format, ...)
{
    CHOIR_ASSERT(status != CHOIR_OK);
    int saved = errno;
    /* Arguments may point into the sentence itself, so it is written aside first. */
    char fresh[CHOIR_MAX_SENTENCE];
    va_list args;
    va_start(args, format);
    errno = saved;
    vsnprintf(fresh, sizeof fresh, format, args);
    va_end(args);
    make_utf8(fresh);
    memcpy(sentence, fresh, sizeof sentence);
    errno = saved;
    return status;
}

choir_status choir_fail_in(choir_status status, const char *format, ...)
{
    CHOIR_ASSERT(status != CHOIR_OK);
    char where[CHOIR_MAX_SENTENCE / 2];
    va_list args;
    va_start(args, format);
    vsnprintf(where, sizeof where, format, args);
    va_end(args);
    trim_cut_character(where);
    return choir_fail(status, "%s: %s", where, sentence);
}

const char *choir_error_message(void)
{
    return sentence;
}
void choir_error_clear(void)
{
    sentence[0] = '\0';
}

const char *choir_status_text(choir_status status)
{
    return (size_t)status < sizeof errors / sizeof *errors ? errors[status].text : "unknown";
}

int choir_status_grpc(choir_status status)
{
    return (size_t)status < sizeof errors / sizeof *errors ? errors[status].grpc : 13;
}

_Noreturn void choir_bug(const char *file, int line, const char *condition)
{
    fprintf(stderr, "choir: bug at %s:%d: %s does not hold; please report it\n", file, line,
            condition);
    abort();
}
