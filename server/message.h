/* WHAT    protobuf-c with Choir's memory: unpacking checked bytes, packing into a gRPC slice.
 * OWNS    What unpack gives belongs to the caller, who frees it with choir_message_free().
 * THREADS Any.
 * ERRORS  CHOIR_E_INVALID (the bytes), CHOIR_E_NO_MEMORY.
 * LIMITS  Only for bytes that choir_wire_check() passed.
 * NEXT    server/wire.h */
#pragma once
#include "base/error.h"
#include "server/wire.h"
#include <grpc/slice.h>

/* Checks and unpacks. */
choir_status choir_message_read(const ProtobufCMessageDescriptor *type,
                                const choir_wire_rule *rules, size_t n_rules, const uint8_t *data,
                                size_t bytes, ProtobufCMessage **out) CHOIR_MUST_USE;
void choir_message_free(ProtobufCMessage *message); /* NULL is fine */

grpc_slice choir_message_pack(const ProtobufCMessage *message);
/* The same, with a string field of `bytes` bytes behind it, which may hold NULs: protobuf-c's own
 * strings end at the first one. */
grpc_slice choir_message_pack_with_text(const ProtobufCMessage *message, uint32_t field,
                                        const char *text, size_t bytes);
