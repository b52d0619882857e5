/* What versions and the journal's export write alike; internal to router/learn/. */
#pragma once
#include <inttypes.h>
#include <jansson.h>
#include <stdint.h>
#include <stdio.h>

/* 16 digits of hexadecimal text: JSON's integers are signed, and many of its readers have 53 bits. NULL: no memory. */
static inline json_t *json_of_bits(uint64_t bits)
{
    char text[17];
    snprintf(text, sizeof text, "%016" PRIx64, bits);
    return json_string(text);
}
