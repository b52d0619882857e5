choir_fuzz(adapter_file_fuzz SOURCES adapter_file_fuzz.c LINKS choir_model_file)
choir_fuzz(gguf_fuzz SOURCES gguf_fuzz.c LINKS choir_model_file)
choir_fuzz(safetensors_fuzz SOURCES safetensors_fuzz.c LINKS choir_model_file)
choir_fuzz(hf_config_fuzz SOURCES hf_config_fuzz.c LINKS choir_model_file)
