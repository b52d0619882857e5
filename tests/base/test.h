/* WHAT    What every test of base/ includes, in the order cmocka wants.
 * OWNS    Nothing.
 * THREADS One.
 * ERRORS  A failed assertion ends its test.
 * LIMITS  Tests only.
 * NEXT    tests/base/options_test.c */
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define ASSERT_SAYS(part)                                                                          \
    do {                                                                                           \
        if (strstr(choir_error_message(), part) == NULL)                                           \
            fail_msg("'%s' does not say '%s'", choir_error_message(), part);                       \
    } while (0)
