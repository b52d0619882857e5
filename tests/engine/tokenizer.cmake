choir_test(tokenizer_test
    SOURCES ${CMAKE_CURRENT_LIST_DIR}/tokenizer_test.c ${CMAKE_SOURCE_DIR}/tests/support/tokenizer_case.c
        ${CMAKE_SOURCE_DIR}/tests/support/gguf_image.c
    LINKS choir_tokenizer)
choir_test(detokenizer_test
    SOURCES ${CMAKE_CURRENT_LIST_DIR}/detokenizer_test.c ${CMAKE_SOURCE_DIR}/tests/support/tokenizer_case.c
    LINKS choir_tokenizer)
choir_test(tokenizer_hostile_test
    SOURCES ${CMAKE_CURRENT_LIST_DIR}/tokenizer_hostile_test.c
    LINKS choir_tokenizer)
