choir_fuzz(tokenizer_json_fuzz SOURCES tokenizer_json_fuzz.c LINKS choir_tokenizer)
choir_fuzz(tokenizer_gguf_fuzz
    SOURCES tokenizer_gguf_fuzz.c ${CMAKE_SOURCE_DIR}/tests/support/gguf_image.c
    LINKS choir_tokenizer)
choir_fuzz(tokenizer_text_fuzz
    SOURCES tokenizer_text_fuzz.c ${CMAKE_SOURCE_DIR}/tests/support/tokenizer_case.c
    LINKS choir_tokenizer)
if(TARGET tokenizer_text_fuzz)
    target_compile_definitions(tokenizer_text_fuzz PRIVATE
        CHOIR_FIXTURES="${CMAKE_SOURCE_DIR}/tests/fixtures")
endif()
