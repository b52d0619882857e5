#include "tune/adapter.h"

#include "base/base.h"

/* The change of an expert's matrix, or a sentence: an expert is an MLP and its merge is W + scale B
 * A, so what an adapter does elsewhere, or in another way, would be lost. */
static choir_status take(choir_tune_adapter *a, const char *folder, const choir_adapter_change *c)
{
    static const struct {
        choir_role role;
        uint32_t part;
    } parts[] = {{CHOIR_ROLE_FFN_GATE, CHOIR_TUNE_GATE},
                 {CHOIR_ROLE_FFN_UP, CHOIR_TUNE_UP},
                 {CHOIR_ROLE_FFN_DOWN, CHOIR_TUNE_DOWN}};
    uint32_t part = CHOIR_TUNE_N_PARTS;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (parts[i].role == c->role) part = parts[i].part;
    if (part == CHOIR_TUNE_N_PARTS)
        return choir_fail(CHOIR_E_INVALID,
                          "%s changes %s, which is none of gate_proj, up_proj and down_proj: all "
                          "that an expert can take over",
                          folder, choir_role_text(c->role));
    if (!choir_adapter_is_lora(c))
        return choir_fail(CHOIR_E_UNIMPLEMENTED,
                          "%s changes %s of layer %u by a %s; Choir merges LoRA without biases "
                          "into experts",
                          folder, choir_role_text(c->role), c->layer, a->data->kind);
    a->loras[(size_t)c->layer * CHOIR_TUNE_N_PARTS + part] =
        (choir_tune_lora){c->rank, c->scale, c->a, c->b};
    return CHOIR_OK;
}

choir_status choir_tune_adapter_open(const char *folder, const choir_model_config *base,
                                     choir_tune_adapter *out)
{
    *out = (choir_tune_adapter){.n_layers = base->n_layers};
    choir_status status;
    CHOIR_TRY_TO(done, status, choir_adapter_data_open(base, folder, &out->data));
    if (out->data->n_virtual > 0 || out->data->n_invocation > 0) {
        status = choir_fail(CHOIR_E_UNIMPLEMENTED, "%s is of the kind %s, which cannot be merged",
                            folder, out->data->kind);
        goto done;
    }
    out->loras = choir_calloc(CHOIR_MEM_TUNE, (size_t)base->n_layers * CHOIR_TUNE_N_PARTS,
                              sizeof *out->loras);
    if (out->loras == NULL) {
        status = choir_fail(CHOIR_E_NO_MEMORY, "%s: no memory for the adapter", folder);
        goto done;
    }
    for (size_t i = 0; i < out->data->n_changes; i++)
        CHOIR_TRY_TO(done, status, take(out, folder, &out->data->changes[i]));
done:
    if (status != CHOIR_OK) choir_tune_adapter_close(out);
    return status;
}

void choir_tune_adapter_close(choir_tune_adapter *adapter)
{
    choir_free(adapter->loras);
    choir_adapter_data_free(adapter->data);
    *adapter = (choir_tune_adapter){0};
}

void choir_tune_lora_add(const choir_tune_lora *lora, uint32_t index, uint32_t cols, float *row)
{
    for (uint32_t k = 0; k < lora->rank; k++) {
        float factor = lora->scale * lora->b[(size_t)index * lora->rank + k];
        const float *a = lora->a + (size_t)k * cols;
        for (uint32_t i = 0; i < cols; i++) row[i] += factor * a[i];
    }
}
