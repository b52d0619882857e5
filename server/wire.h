/* WHAT    Bytes from outside, checked against a message's descriptor before protobuf-c unpacks
 *         them; and the few wire primitives that the reflection database and the writers need.
 * OWNS    Nothing.
 * THREADS Any.
 * ERRORS  CHOIR_E_INVALID; the sentence names the field by its path, the value and the limit.
 * LIMITS  Nesting CHOIR_WIRE_MAX_DEPTH, CHOIR_WIRE_MAX_FIELDS fields in all. Nothing is copied.
 * NEXT    server/generate_request.h */
#pragma once
#include "base/error.h"
#include <protobuf-c/protobuf-c.h>

enum {
    CHOIR_WIRE_MAX_DEPTH = 16,
    CHOIR_WIRE_MAX_FIELDS = 1 << 18,   /* on the wire, unknown ones included */
    CHOIR_WIRE_FIELDS_OF_MESSAGE = 64, /* what one message type may declare */
};

/* A field's bounds. Fields without a rule are bounded by the size of the message alone. */
typedef struct choir_wire_rule {
    const ProtobufCMessageDescriptor *message;
    const char *field;
    uint32_t max_count; /* elements of a repeated field; 0: no bound of its own */
    uint32_t max_bytes; /* of a string or bytes value, each; 0: no bound of its own */
} choir_wire_rule;

/* Walks the whole message: structure, UTF-8 and NULs of every string, counts, lengths, nesting.
 * What passes can be unpacked with memory in proportion to `bytes`. */
choir_status choir_wire_check(const ProtobufCMessageDescriptor *type, const choir_wire_rule *rules,
                              size_t n_rules, const uint8_t *data, size_t bytes) CHOIR_MUST_USE;

bool choir_utf8_valid(const char *text, size_t bytes);

/* A cursor over one message's fields. */
typedef struct choir_wire_field {
    uint32_t number;
    uint32_t type;       /* 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes */
    uint64_t value;      /* of types 0, 1 and 5 */
    const uint8_t *data; /* of type 2 */
    size_t bytes;
} choir_wire_field;

/* Takes the next field from [*at, end). False at the end and on damage; *at == end tells which. */
bool choir_wire_next(const uint8_t **at, const uint8_t *end, choir_wire_field *out);

/* Writing: both return how many bytes they wrote; `out` may be NULL to measure. */
size_t choir_wire_put_varint(uint8_t *out, uint64_t value);
/* A length-delimited field's key and length, without its bytes. */
size_t choir_wire_put_header(uint8_t *out, uint32_t field, size_t bytes);
