if(TARGET choir_tokenizer AND TARGET choir_sampler)
    choir_library(engine
        SOURCES adapt.c adapter.c adapters.c attention.c budget.c chat_variables.c engine.c generation.c head.c load.c moe.c multiply.c predict.c probe.c rope.c scratch.c small.c stream.c token_path.c
        LINKS choir_base choir_kernels choir_model_file choir_tokenizer choir_chat_template
              choir_sampler choir_router choir_experts PkgConfig::XXHASH m)
endif()
