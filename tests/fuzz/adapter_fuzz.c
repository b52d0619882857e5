/* An adapter_config.json, and behind a zero byte an adapter_model.safetensors: read or refused;
 * what is read can be merged. The seeds fit the shape below. */
#include "tests/fuzz/two_files.h"
#include "tune/adapter.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const choir_model_config base = {.n_layers = 2, .hidden = 8, .ffn_hidden = 12};
    const char *folder =
        write_two_files("adapter_config.json", "adapter_model.safetensors", data, bytes);
    choir_tune_adapter a;
    choir_status status = choir_tune_adapter_open(folder, &base, &a);
    CHOIR_ASSERT(status != CHOIR_E_INTERNAL && status != CHOIR_E_IO);
    if (status != CHOIR_OK) return 0;
    for (uint32_t i = 0; i < base.n_layers * CHOIR_TUNE_N_PARTS; i++) {
        bool down = i % CHOIR_TUNE_N_PARTS == CHOIR_TUNE_DOWN;
        float row[12] = {0};
        choir_tune_lora_add(&a.loras[i], down ? 7 : 11, down ? 12 : 8, row);
    }
    choir_tune_adapter_close(&a);
    return 0;
}
