#include "tests/tune/peft.h"

#include "base/base.h"
#include "engine/safetensors.h"
#include "tune/encode.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char *const projections[N_PROJ] = {"gate_proj", "up_proj", "down_proj"};

void add_tensor(tensors *t, const char *name, uint64_t rows, uint64_t cols, const float *values)
{
    char entry[512], shape[64];
    size_t n = rows * cols;
    if (rows == 1)
        snprintf(shape, sizeof shape, "%zu", (size_t)cols);
    else
        snprintf(shape, sizeof shape, "%zu,%zu", (size_t)rows, (size_t)cols);
    int bytes = snprintf(entry, sizeof entry,
                         "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                         t->n == 0 ? "{" : ",", name, shape, t->n * 4, (t->n + n) * 4);
    t->header = realloc(t->header, t->header_bytes + (size_t)bytes + 2);
    memcpy(t->header + t->header_bytes, entry, (size_t)bytes);
    t->header_bytes += (size_t)bytes;
    t->data = realloc(t->data, (t->n + n) * sizeof *t->data);
    memcpy(t->data + t->n, values, n * sizeof *values);
    t->n += n;
}

void write_tensors(tensors *t, const char *folder, const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    uint64_t bytes = t->header_bytes + 1;
    t->header[t->header_bytes] = '}';
    CHOIR_ASSERT(f != NULL && fwrite(&bytes, 8, 1, f) == 1 && fwrite(t->header, bytes, 1, f) == 1 &&
                 fwrite(t->data, sizeof *t->data, t->n, f) == t->n && fclose(f) == 0);
    free(t->header);
    free(t->data);
}

void write_text(const char *folder, const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    CHOIR_ASSERT(f != NULL && fputs(text, f) >= 0 && fclose(f) == 0);
}

/* The factors of one projection: A [rank, in], B [out, rank]. */
typedef struct factors {
    uint32_t in, out;
    float *a, *b;
} factors;

static float draw(uint32_t *state)
{
    *state = *state * 1664525 + 1013904223;
    return (float)(*state >> 8) / (1 << 23) - 1;
}

static factors factors_of(const lora_shape *s, uint32_t layer, uint32_t projection, uint32_t seed)
{
    bool down = projection == DOWN_PROJ;
    factors f = {.in = down ? s->ffn : s->hidden, .out = down ? s->hidden : s->ffn};
    uint32_t state = seed * 7919 + layer * 131 + projection;
    f.a = malloc((size_t)f.in * s->rank * sizeof *f.a);
    f.b = malloc((size_t)f.out * s->rank * sizeof *f.b);
    for (uint32_t i = 0; i < f.in * s->rank; i++) f.a[i] = draw(&state);
    for (uint32_t i = 0; i < f.out * s->rank; i++) f.b[i] = draw(&state) * s->size;
    return f;
}

static void free_factors(factors *f)
{
    free(f->a);
    free(f->b);
}

void write_adapter(const char *folder, const lora_shape *s, uint32_t seed)
{
    char text[256], name[128];
    tensors t = {0};
    CHOIR_ASSERT(mkdir(folder, 0777) == 0);
    snprintf(text, sizeof text,
             "{\"peft_type\": \"LORA\", \"r\": %u, \"lora_alpha\": %g, \"bias\": \"none\", "
             "\"target_modules\": [\"gate_proj\", \"up_proj\", \"down_proj\"]}",
             s->rank, (double)(s->scale * (float)s->rank));
    write_text(folder, "adapter_config.json", text);
    for (uint32_t layer = 0; layer < s->n_layers; layer++)
        for (uint32_t p = 0; p < N_PROJ; p++) {
            factors f = factors_of(s, layer, p, seed);
            const char *prefix = "base_model.model.model.layers";
            snprintf(name, sizeof name, "%s.%u.mlp.%s.lora_A.weight", prefix, layer,
                     projections[p]);
            add_tensor(&t, name, s->rank, f.in, f.a);
            snprintf(name, sizeof name, "%s.%u.mlp.%s.lora_B.weight", prefix, layer,
                     projections[p]);
            add_tensor(&t, name, f.out, s->rank, f.b);
            free_factors(&f);
        }
    write_tensors(&t, folder, "adapter_model.safetensors");
}

static void add_delta(float *w, const lora_shape *s, uint32_t layer, uint32_t projection,
                      uint32_t seed)
{
    factors f = factors_of(s, layer, projection, seed);
    for (uint32_t o = 0; o < f.out; o++)
        for (uint32_t i = 0; i < f.in; i++) {
            double sum = 0;
            for (uint32_t r = 0; r < s->rank; r++)
                sum += (double)f.b[o * s->rank + r] * (double)f.a[r * f.in + i];
            w[(size_t)o * f.in + i] += (float)((double)s->scale * sum);
        }
    free_factors(&f);
}

static void copy_file(const char *from, const char *to, const char *name)
{
    char path[512], *data;
    size_t bytes;
    snprintf(path, sizeof path, "%s/%s", from, name);
    CHOIR_ASSERT(choir_file_read(path, 1 << 22, &data, &bytes) == CHOIR_OK);
    write_text(to, name, data);
    choir_free(data);
}

static void round_to(choir_dtype dtype, uint32_t rows, uint32_t cols, float *w)
{
    size_t bytes = choir_dtype_row_bytes(dtype, cols);
    uint8_t *row = malloc(bytes);
    const choir_tensor view = {dtype, 1, cols, row, bytes};
    for (uint32_t r = 0; r < rows; r++) {
        CHOIR_ASSERT(choir_tune_encode(dtype, w + (size_t)r * cols, cols, row));
        choir_tensor_row(&view, 0, w + (size_t)r * cols);
    }
    free(row);
}

void write_merged(const char *base, const char *folder, const lora_shape *s, uint32_t seed,
                  choir_dtype dtype)
{
    char path[512], text[16];
    choir_safetensors *file;
    tensors t = {0};
    CHOIR_ASSERT(mkdir(folder, 0777) == 0);
    copy_file(base, folder, "config.json");
    copy_file(base, folder, "tokenizer.json");
    snprintf(path, sizeof path, "%s/model.safetensors", base);
    CHOIR_ASSERT(choir_safetensors_open(path, &file) == CHOIR_OK);
    for (size_t i = 0; i < choir_safetensors_count(file); i++) {
        const choir_safetensor *from = choir_safetensors_at(file, i);
        uint32_t rows = from->n_dims == 2 ? (uint32_t)from->dims[0] : 1, layer;
        uint32_t cols = (uint32_t)from->dims[from->n_dims - 1];
        const choir_tensor view = {from->dtype, rows, cols, from->data, from->bytes};
        float *w = malloc((size_t)rows * cols * sizeof *w);
        for (uint32_t r = 0; r < rows; r++) choir_tensor_row(&view, r, w + (size_t)r * cols);
        if (sscanf(from->name, "model.layers.%u.mlp.%15[a-z_]", &layer, text) == 2)
            for (uint32_t p = 0; p < N_PROJ; p++)
                if (strcmp(text, projections[p]) == 0) add_delta(w, s, layer, p, seed);
        if (rows > 1) round_to(dtype, rows, cols, w);
        add_tensor(&t, from->name, rows, cols, w);
        free(w);
    }
    choir_safetensors_close(file);
    write_tensors(&t, folder, "model.safetensors");
}

static int remove_one(const char *path, const struct stat *s, int kind, struct FTW *at)
{
    (void)s, (void)kind, (void)at;
    return remove(path);
}

void remove_folder(const char *folder)
{
    nftw(folder, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

static uint32_t n_seen;

static int count_one(const char *path, const struct stat *s, int kind, struct FTW *at)
{
    (void)path, (void)s, (void)kind, (void)at;
    n_seen++;
    return 0;
}

uint32_t n_in_folder(const char *folder)
{
    n_seen = 0;
    CHOIR_ASSERT(nftw(folder, count_one, 8, FTW_PHYS) == 0);
    return n_seen - 1;
}
