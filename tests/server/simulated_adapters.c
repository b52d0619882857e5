#include "tests/server/simulated_adapters.h"

#include <jansson.h>
#include <math.h>
#include <string.h>
#include <time.h>
#include <xxhash.h>

enum { HEAD_BYTES = 10 };

typedef struct simulated_adapter {
    int shift;
    bool poison;
} simulated_adapter;

typedef struct settings {
    int shift, bytes, sole, poison, make_ms;
} settings;

static choir_status read_settings(const choir_adapter_file *file, settings *out)
{
    json_error_t error;
    *out = (settings){0};
    if (file->config == NULL)
        return choir_fail(CHOIR_E_FORMAT, "adapter %s is no simulated one", file->name);
    json_t *config = json_loadb(file->config, file->config_bytes, 0, &error);
    int bad = config == NULL || json_unpack(config, "{s:i, s:i, s?b, s?b, s?i}", "shift",
                                            &out->shift, "bytes", &out->bytes, "sole", &out->sole,
                                            "poison", &out->poison, "make_ms", &out->make_ms) != 0;
    json_decref(config);
    return bad ? choir_fail(CHOIR_E_FORMAT,
                            "adapter %s: adapter_config.json has no shift or no bytes", file->name)
               : CHOIR_OK;
}

static choir_status check(void *user, const choir_adapter_file *file, choir_adapter_facts *facts)
{
    (void)user;
    settings s;
    CHOIR_TRY(read_settings(file, &s));
    if (file->file_bytes != (uint64_t)s.bytes + HEAD_BYTES)
        return choir_fail(CHOIR_E_INVALID, "adapter %s: its tensors have %llu bytes, must be %d",
                          file->name, (unsigned long long)file->file_bytes, s.bytes + HEAD_BYTES);
    *facts = (choir_adapter_facts){.bytes = (uint64_t)s.bytes,
                                   .kind = "simulated",
                                   .n_parameters = (uint64_t)s.bytes,
                                   .targets = UINT64_C(1) << CHOIR_ROLE_ATTN_Q,
                                   .sole = s.sole,
                                   .max_rank = 8};
    return CHOIR_OK;
}

static choir_status make(void *user, const choir_adapter_file *file, choir_adapter_made *made)
{
    (void)user;
    settings s;
    CHOIR_TRY(read_settings(file, &s));
    const uint8_t *data = file->tensors;
    if (file->tensor_bytes != (uint64_t)s.bytes + HEAD_BYTES)
        return choir_fail(CHOIR_E_INVALID, "adapter %s: its tensors are cut", file->name);
    for (int i = 0; i < s.bytes; i++)
        if (data[HEAD_BYTES + i] != (uint8_t)s.shift)
            return choir_fail(CHOIR_E_DATA_LOSS,
                              "adapter %s: byte %d of its tensors is %u, must be %d", file->name, i,
                              data[HEAD_BYTES + i], s.shift);
    if (s.make_ms > 0) {
        struct timespec t = {s.make_ms / 1000, s.make_ms % 1000 * 1000000L};
        nanosleep(&t, NULL);
    }
    simulated_adapter *a = choir_alloc(CHOIR_MEM_ADAPTERS, (size_t)s.bytes + sizeof *a);
    if (a == NULL) return choir_fail(CHOIR_E_NO_MEMORY, "no memory for a simulated adapter");
    memset(a, 0, (size_t)s.bytes + sizeof *a); /* so that what leaks is seen to grow */
    *a = (simulated_adapter){s.shift, s.poison};
    *made = (choir_adapter_made){.adapter = a,
                                 .bytes = (uint64_t)s.bytes,
                                 .digest = XXH3_64bits(data, file->tensor_bytes) | 1,
                                 .sole = s.sole};
    return CHOIR_OK;
}

static void free_one(void *user, void *adapter)
{
    (void)user;
    choir_free(adapter);
}

choir_status simulated_adapters_create(const char *folder, uint64_t budget_bytes,
                                       choir_adapters **out)
{
    choir_adapters_options o = CHOIR_ADAPTERS_OPTIONS_DEFAULT;
    uint32_t n_good, n_bad;
    o.folder = folder;
    if (budget_bytes > 0) o.budget_bytes = budget_bytes;
    o.check = check;
    o.make = make;
    o.free = free_one;
    o.retry_ns = CHOIR_SECOND / 5;
    CHOIR_TRY(choir_adapters_create(&o, out));
    choir_status status = choir_adapters_register_folder(*out, folder, &n_good, &n_bad);
    if (status == CHOIR_OK) return CHOIR_OK;
    choir_adapters_destroy(*out);
    *out = NULL;
    return status;
}

int simulated_adapters_shift(const choir_span *span, bool *poison)
{
    double sum = 0;
    for (uint32_t i = 0; i < span->n_adapters; i++) {
        const simulated_adapter *a =
            (const simulated_adapter *)(const void *)span->adapters[i].adapter;
        sum += (double)span->adapters[i].weight * a->shift;
        *poison = *poison || a->poison;
    }
    return (int)(lround(sum) % 26 + 26) % 26;
}
