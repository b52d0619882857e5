file(GLOB families CONFIGURE_DEPENDS families/*.c)
choir_library(model_file
    SOURCES gguf.c gguf_config.c hf_config.c model_config.c model_file.c roles.c safetensors.c
            ${families}
    LINKS choir_base choir_kernels PkgConfig::JANSSON PkgConfig::XXHASH m)
