/* WHAT    Messages on their way in and out: gRPC's buffers made contiguous and decompressed,
 *         protobuf-c with Choir's memory, packing into a gRPC slice.
 * OWNS    What receive and read give belongs to the caller (choir_free(), choir_message_free()).
 * THREADS Any.
 * ERRORS  CHOIR_E_INVALID (the bytes), CHOIR_E_NO_MEMORY.
 * LIMITS  Only for bytes that choir_wire_check() passed.
 * NEXT    server/wire.h */
#pragma once
#include "base/error.h"
#include "server/wire.h"
#include <grpc/grpc.h>

/* One contiguous copy, of at most `max_bytes` also where the client compressed it: gRPC itself
 * would decompress first and look at the size then. */
choir_status choir_message_receive(grpc_byte_buffer *buffer, size_t max_bytes, uint8_t **data,
                                   size_t *bytes) CHOIR_MUST_USE;

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
