choir_library(model_file
    SOURCES gguf.c gguf_config.c hf_config.c model_file.c safetensors.c families/families.c
            families/llama.c families/mistral.c families/mixtral.c families/olmoe.c
            families/qwen2.c families/qwen3.c families/qwen3_moe.c
    LINKS choir_base choir_kernels PkgConfig::JANSSON PkgConfig::XXHASH m)
