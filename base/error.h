/* WHAT    One list of errors: the enum, its text and its gRPC status code; a sentence kept per thread.
 * OWNS    A thread-local sentence, valid until the thread's next choir_fail().
 * THREADS Any; nothing is shared.
 * ERRORS  Say why once, where it broke: `return choir_fail(CHOIR_E_IO, "open %s: %m", path);`
 *         then forward silently with CHOIR_TRY.
 * LIMITS  A sentence is UTF-8, whatever the names in it are: bytes that are none are '?'. Longer ones than
 *         CHOIR_MAX_SENTENCE are cut on a character.
 * NEXT    base/base.h */
#pragma once
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* X(name, what it means, gRPC status code). The numbers are those of google.rpc.Code. */
#define CHOIR_ERROR_LIST(X)                                                                        \
    X(OK, "ok", 0)                                                                                 \
    X(E_CANCELLED, "cancelled", 1)                                                                 \
    X(E_INVALID, "invalid argument", 3)                                                            \
    X(E_DEADLINE, "deadline exceeded", 4)                                                          \
    X(E_NOT_FOUND, "not found", 5)                                                                 \
    X(E_EXISTS, "already exists", 6)                                                               \
    X(E_DENIED, "permission denied", 7)                                                            \
    X(E_FULL, "full now, try later", 8)                                                            \
    X(E_NO_MEMORY, "out of memory", 8)                                                             \
    X(E_PRECONDITION, "not possible in this state", 9)                                             \
    X(E_FORMAT, "malformed file", 9)                                                               \
    X(E_ABORTED, "aborted", 10)                                                                    \
    X(E_UNIMPLEMENTED, "not implemented", 12)                                                      \
    X(E_INTERNAL, "a bug in choir", 13)                                                            \
    X(E_IO, "input/output error", 14)                                                              \
    X(E_UNAVAILABLE, "unavailable now", 14)                                                        \
    X(E_DATA_LOSS, "data lost or damaged", 15)                                                     \
    X(E_UNAUTHENTICATED, "unauthenticated", 16)

typedef enum choir_status {
#define X(name, text, grpc) CHOIR_##name,
    CHOIR_ERROR_LIST(X)
#undef X
} choir_status;

#define CHOIR_MUST_USE __attribute__((warn_unused_result))
#define CHOIR_PRINTF(f, a) __attribute__((format(printf, f, a)))

/* Records the sentence for this thread and returns `status` (never CHOIR_OK). %m is errno. */
choir_status choir_fail(choir_status status, const char *format, ...) CHOIR_PRINTF(2, 3);
/* Spelled out for the compiler, which then sees that a caller's outputs are set whenever it goes on. */
#define choir_fail(status, ...) ((void)choir_fail(status, __VA_ARGS__), (status))
/* Puts "what: " before this thread's sentence; for context a lower layer cannot know. */
choir_status choir_fail_in(choir_status status, const char *format, ...) CHOIR_PRINTF(2, 3);
const char *choir_error_message(void);             /* this thread's sentence */
enum { CHOIR_MAX_SENTENCE = 1024 };                /* bytes, with the NUL */
void choir_error_clear(void);                      /* for reuse of a thread; not needed before calls */
const char *choir_status_text(choir_status status); /* "not found" */
int choir_status_grpc(choir_status status);        /* 5 */

#define CHOIR_TRY(call)                                                                            \
    do {                                                                                           \
        choir_status choir_try_ = (call);                                                          \
        if (__builtin_expect(choir_try_ != CHOIR_OK, 0)) return choir_try_;                        \
    } while (0)

/* The same where a function has one exit: `status` is set and control goes to `label`. */
#define CHOIR_TRY_TO(label, status, call)                                                          \
    do {                                                                                           \
        (status) = (call);                                                                         \
        if (__builtin_expect((status) != CHOIR_OK, 0)) goto label;                                 \
    } while (0)

/* Bugs stop: stays on in release builds. Never for input from outside. */
#define CHOIR_ASSERT(condition)                                                                    \
    do {                                                                                           \
        if (__builtin_expect(!(condition), 0)) choir_bug(__FILE__, __LINE__, #condition);          \
    } while (0)
_Noreturn void choir_bug(const char *file, int line, const char *condition);
