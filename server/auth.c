/* API keys. The comparison takes the same time wherever the first wrong byte is. */
#include "server/call.h"

#include <string.h>
#include <strings.h>

static bool equal(const char *key, const uint8_t *given, size_t given_bytes)
{
    size_t n = strlen(key);
    size_t different = n ^ given_bytes;
    for (size_t i = 0; i < given_bytes; i++)
        different |= (uint8_t)key[n == 0 ? 0 : i % n] ^ given[i];
    return different == 0;
}

static bool known(const choir_server *server, const uint8_t *given, size_t bytes)
{
    bool found = false;
    for (uint32_t i = 0; i < server->options.n_api_keys; i++)
        found |= equal(server->options.api_keys[i], given, bytes);
    return found;
}

bool choir_auth_allows_value(const choir_server *server, const uint8_t *value, size_t bytes)
{
    static const char scheme[] = "Bearer ";
    const size_t skip = sizeof scheme - 1;
    return bytes >= skip && strncasecmp((const char *)value, scheme, skip) == 0 &&
           known(server, value + skip, bytes - skip);
}

bool choir_auth_allows(const choir_server *server, const grpc_metadata_array *metadata)
{
    if (server->options.n_api_keys == 0) return true;
    for (size_t i = 0; i < metadata->count; i++) {
        grpc_slice key = metadata->metadata[i].key, value = metadata->metadata[i].value;
        if (grpc_slice_str_cmp(key, "authorization") != 0) continue;
        if (choir_auth_allows_value(server, GRPC_SLICE_START_PTR(value), GRPC_SLICE_LENGTH(value)))
            return true;
    }
    return false;
}
