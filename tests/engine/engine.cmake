if(TARGET choir_engine)
    choir_test(engine_adapters_test SOURCES adapters_test.c LINKS choir_engine)
    choir_test(engine_budget_test SOURCES budget_test.c LINKS choir_engine)
    choir_test(engine_test SOURCES engine_test.c sequence.c LINKS choir_engine)
    choir_test(engine_streaming_test SOURCES streaming_test.c sequence.c LINKS choir_tune choir_engine)
    choir_test(engine_small_test SOURCES small_test.c sequence.c LINKS choir_tune choir_engine PkgConfig::XXHASH)
    choir_test(engine_slice_test SOURCES slice_test.c LINKS choir_model_file)
    choir_test(engine_hostile_models_test SOURCES hostile_models_test.c sequence.c LINKS choir_engine)
    choir_test(engine_adapter_file_test
               SOURCES adapter_file_test.c ../support/adapter_image.c ../support/gguf_image.c LINKS choir_model_file)
    choir_test(engine_adapter_kinds_test
               SOURCES adapter_kinds_test.c ../support/adapter_image.c ../support/gguf_image.c LINKS choir_model_file)
    choir_test(engine_files_test SOURCES files_test.c LINKS choir_engine PkgConfig::JANSSON)
    choir_test(engine_oracle_test SOURCES oracle_test.c sequence.c ../support/reference.c
               LINKS choir_engine)
    choir_test(engine_smol_test SOURCES smol_test.c sequence.c ../support/smol_model.c LINKS choir_engine PkgConfig::JANSSON
               TIMEOUT 900)
endif()
