choir_test(chat_template_test
    SOURCES ${CMAKE_CURRENT_LIST_DIR}/chat_template_test.c
    LINKS choir_chat_template PkgConfig::JANSSON)
