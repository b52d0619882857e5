choir_test(sampler_test
    SOURCES ${CMAKE_CURRENT_LIST_DIR}/sampler_test.c
    LINKS choir_sampler)
