#include "engine/texts.h"

#include "engine/pack_file.h"

#include <stdio.h>
#include <string.h>

void choir_texts_path(const choir_texts *t, const char *name, char *path, size_t bytes)
{
    snprintf(path, bytes, "%s/%s", t->path, name);
}

bool choir_texts_have(const choir_texts *t, const char *name)
{
    char path[4096];
    const char *data;
    size_t bytes;
    if (t->pack != NULL) return choir_pack_text(t->pack, name, &data, &bytes);
    choir_texts_path(t, name, path, sizeof path);
    return choir_file_exists(path);
}

choir_status choir_texts_read(const choir_texts *t, const char *name, size_t max_bytes, char **out,
                              size_t *out_bytes)
{
    char path[4096];
    const char *data;
    choir_texts_path(t, name, path, sizeof path);
    if (t->pack == NULL) return choir_file_read(path, max_bytes, out, out_bytes);
    if (!choir_pack_text(t->pack, name, &data, out_bytes))
        return choir_fail(CHOIR_E_NOT_FOUND, "%s has no text '%s'", t->path, name);
    if (*out_bytes > max_bytes)
        return choir_fail(CHOIR_E_INVALID, "%s has %zu bytes, the limit is %zu", path, *out_bytes,
                          max_bytes);
    *out = choir_alloc(CHOIR_MEM_OTHER, *out_bytes + 1);
    if (*out == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory to read %s", path);
    memcpy(*out, data, *out_bytes);
    (*out)[*out_bytes] = '\0';
    return CHOIR_OK;
}
