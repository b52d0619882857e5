choir_fuzz(chat_template_fuzz
    SOURCES ${CMAKE_CURRENT_LIST_DIR}/chat_template_fuzz.c
    LINKS choir_chat_template PkgConfig::JANSSON)
