#include "server/message.h"

#include "base/memory.h"

#include <grpc/byte_buffer.h>
#include <string.h>
#include <zlib.h>

static choir_status copy_slices(const grpc_slice_buffer *slices, uint8_t **data, size_t *bytes)
{
    uint8_t *p = *data = choir_alloc(CHOIR_MEM_REQUESTS, slices->length + 1);
    if (p == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a message of %zu bytes",
                          slices->length);
    for (size_t i = 0; i < slices->count; i++) {
        size_t n = GRPC_SLICE_LENGTH(slices->slices[i]);
        memcpy(p, GRPC_SLICE_START_PTR(slices->slices[i]), n);
        p += n;
    }
    *bytes = slices->length;
    return CHOIR_OK;
}

/* Twice the room, never beyond the limit. */
static choir_status grow(uint8_t **data, size_t *room, size_t max_bytes)
{
    if (*room == max_bytes)
        return choir_fail(CHOIR_E_INVALID,
                          "the message has more than %zu bytes when decompressed, the limit",
                          max_bytes);
    size_t more = *room == 0 ? 4096 : 2 * *room;
    if (more > max_bytes) more = max_bytes;
    uint8_t *grown = choir_realloc(CHOIR_MEM_REQUESTS, *data, more);
    if (grown == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a message of %zu bytes", more);
    *data = grown;
    *room = more;
    return CHOIR_OK;
}

static choir_status inflate_slices(z_stream *z, const grpc_slice_buffer *slices, size_t max_bytes,
                                   uint8_t **data, size_t *bytes)
{
    size_t room = 0;
    int result = Z_OK;
    for (size_t i = 0; i < slices->count && result == Z_OK; i++) {
        z->next_in = GRPC_SLICE_START_PTR(slices->slices[i]);
        z->avail_in = (uInt)GRPC_SLICE_LENGTH(slices->slices[i]);
        while (result == Z_OK && (z->avail_in != 0 || z->avail_out == 0)) {
            if (z->total_out == room) CHOIR_TRY(grow(data, &room, max_bytes));
            z->next_out = *data + z->total_out;
            z->avail_out = (uInt)(room - z->total_out);
            result = inflate(z, Z_NO_FLUSH);
        }
    }
    *bytes = z->total_out;
    if (result == Z_STREAM_END) return CHOIR_OK;
    return choir_fail(CHOIR_E_INVALID, "the message's compressed bytes are damaged or cut short");
}

choir_status choir_message_receive(grpc_byte_buffer *buffer, size_t max_bytes, uint8_t **data,
                                   size_t *bytes)
{
    enum { GZIP_OR_ZLIB = 32 + MAX_WBITS };
    const grpc_slice_buffer *slices = &buffer->data.raw.slice_buffer;
    *data = NULL;
    *bytes = 0;
    if (buffer->data.raw.compression == GRPC_COMPRESS_NONE) return copy_slices(slices, data, bytes);
    z_stream z = {0};
    if (inflateInit2(&z, GZIP_OR_ZLIB) != Z_OK)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory to decompress a message");
    choir_status status = inflate_slices(&z, slices, max_bytes, data, bytes);
    inflateEnd(&z);
    if (status != CHOIR_OK) {
        choir_free(*data);
        *data = NULL;
    }
    return status;
}

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
