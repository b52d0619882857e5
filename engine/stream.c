/* Streamed experts of files that are not packed: read slice by slice, turned into the kernels'
 * layout as they arrive. */
#include "engine/state.h"

#include <sys/stat.h>
#include <xxhash.h>

enum { PARTS = CHOIR_EXPERT_PARTS };

/* Of gate, up and down: views whose data is replaced by what was read. Extent i is part i's;
 * MXFP4's exponents come behind those. */
struct expert_slices {
    choir_slice parts[PARTS];
};

choir_status choir_stream_create(choir_engine *e, const choir_model_file *file)
{
    size_t n = (size_t)e->config.n_layers * e->config.n_experts;
    uint32_t number;
    if (choir_model_file_pack(file) != NULL) {
        if (e->options.exact)
            return choir_fail(CHOIR_E_UNIMPLEMENTED,
                              "%s: exact arithmetic on a pack wants all its experts in memory",
                              e->path);
        return choir_experts_add_file(e->experts, e->path, &number);
    }
    e->slices = choir_calloc(CHOIR_MEM_EXPERTS, n, sizeof *e->slices);
    if (e->slices == NULL)
        return choir_fail(CHOIR_E_NO_MEMORY, "no memory for the places of %zu experts", n);
    for (uint32_t i = 0; i < choir_model_file_n_parts(file); i++) {
        CHOIR_TRY(choir_experts_add_file(e->experts, choir_model_file_part_path(file, i), &number));
        CHOIR_ASSERT(number == i);
    }
    choir_log(CHOIR_LOG_WARNING,
              "%s is not packed: its experts are rearranged at every read; `choir pack` makes a "
              "file that streams faster",
              e->path);
    return CHOIR_OK;
}

static choir_status add_extent(const choir_model_file *file, const uint8_t *data, uint64_t bytes,
                               choir_expert_source *to)
{
    choir_expert_extent *x = &to->extents[to->n_extents++];
    if (bytes > UINT32_MAX / 2 || !choir_model_file_locate(file, data, &x->file, &x->offset))
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "an expert's tensor of %llu bytes cannot be streamed",
                          (unsigned long long)bytes);
    x->bytes = (uint32_t)bytes;
    return CHOIR_OK;
}

choir_status choir_stream_place(choir_engine *e, const choir_model_file *file, uint32_t layer_index,
                                uint32_t expert, const choir_slice slices[PARTS],
                                const choir_expert *planned, uint64_t *digest)
{
    choir_expert_source source = {.packed = false};
    for (int i = 0; i < PARTS; i++)
        CHOIR_TRY(add_extent(file, slices[i].data, choir_slice_span(&slices[i]), &source));
    for (int i = 0; i < PARTS; i++)
        if (slices[i].scales != NULL)
            CHOIR_TRY(add_extent(
                file, slices[i].scales,
                (slices[i].rows - 1) * slices[i].scales_stride + slices[i].cols / 32, &source));
    expert_slices *to = &e->slices[(size_t)layer_index * e->config.n_experts + expert];
    for (int i = 0; i < PARTS; i++) to->parts[i] = slices[i];
    /* The bytes are not read now: where they lie, in files of which age, stands for them. */
    *digest = XXH3_64bits(source.extents, source.n_extents * sizeof *source.extents);
    for (uint32_t i = 0; i < source.n_extents; i++) {
        struct stat st;
        if (stat(choir_model_file_part_path(file, source.extents[i].file), &st) != 0) continue;
        int64_t age[] = {st.st_size, st.st_mtim.tv_sec, st.st_mtim.tv_nsec, (int64_t)st.st_ino};
        *digest = XXH3_64bits_withSeed(age, sizeof age, *digest);
    }
    return choir_experts_place(e->experts, layer_index, expert, planned, &source);
}

bool choir_stream_unpack(void *engine, uint32_t layer_index, uint32_t expert, uint32_t part,
                         const uint8_t *const *staged, const choir_expert *into)
{
    choir_engine *e = engine;
    const expert_slices *x = &e->slices[(size_t)layer_index * e->config.n_experts + expert];
    const choir_matrix *m = choir_expert_part(into, part);
    choir_slice slice = x->parts[part];
    choir_tensor t;
    void *copy;
    slice.data = staged[part];
    if (slice.scales != NULL) { /* their extents follow the parts', of those that have some */
        uint32_t at = PARTS;
        for (uint32_t i = 0; i < part; i++) at += x->parts[i].scales != NULL;
        slice.scales = staged[at];
    }
    if (m->layout == CHOIR_LAYOUT_EXACT) {
        choir_slice_copy(&slice, (void *)m->data);
        return true;
    }
    if (!choir_slice_tensor(&slice, CHOIR_MEM_SCRATCH, &t, &copy)) return false;
    choir_matrix_pack(m, &t, (void *)m->data, 0, m->rows);
    choir_free(copy);
    return true;
}
