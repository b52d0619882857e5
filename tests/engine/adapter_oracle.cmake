if(TARGET choir_engine)
    choir_test(engine_adapter_oracle_test SOURCES adapter_oracle_test.c sequence.c ../support/reference.c
               LINKS choir_engine)
    choir_test(engine_adapter_batch_test SOURCES adapter_batch_test.c sequence.c ../support/random_adapter.c
               LINKS choir_engine)
endif()
