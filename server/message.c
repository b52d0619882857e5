#include "server/message.h"

#include "base/memory.h"

#include <string.h>

static void *allocate(void *user, size_t bytes)
{
    (void)user;
    return choir_alloc(CHOIR_MEM_REQUESTS, bytes);
}

static void release(void *user, void *p)
{
    (void)user;
    choir_free(p);
}

static ProtobufCAllocator allocator = {allocate, release, NULL};

choir_status choir_message_read(const ProtobufCMessageDescriptor *type,
                                const choir_wire_rule *rules, size_t n_rules, const uint8_t *data,
                                size_t bytes, ProtobufCMessage **out)
{
    CHOIR_TRY(choir_wire_check(type, rules, n_rules, data, bytes));
    *out = protobuf_c_message_unpack(type, &allocator, bytes, data);
    /* What the walk passes, unpack takes too: what is left is memory. */
    if (*out == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a %s of %zu bytes", type->short_name,
                          bytes);
    return CHOIR_OK;
}

void choir_message_free(ProtobufCMessage *message)
{
    if (message != NULL) protobuf_c_message_free_unpacked(message, &allocator);
}

grpc_slice choir_message_pack(const ProtobufCMessage *message)
{
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    return slice;
}

grpc_slice choir_message_pack_with_text(const ProtobufCMessage *message, uint32_t field,
                                        const char *text, size_t bytes)
{
    if (bytes == 0) return choir_message_pack(message);
    size_t packed = protobuf_c_message_get_packed_size(message);
    size_t header = choir_wire_put_header(NULL, field, bytes);
    grpc_slice slice = grpc_slice_malloc(packed + header + bytes);
    uint8_t *p = GRPC_SLICE_START_PTR(slice);
    protobuf_c_message_pack(message, p);
    choir_wire_put_header(p + packed, field, bytes);
    memcpy(p + packed + header, text, bytes);
    return slice;
}
