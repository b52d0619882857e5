choir_library(chat_template
    SOURCES
        chat_template.c
        chat_template_eval.c
        chat_template_exec.c
        chat_template_filters.c
        chat_template_format.c
        chat_template_lex.c
        chat_template_object.c
        chat_template_parse.c
        chat_template_parse_expr.c
        chat_template_sequences.c
        chat_template_strings.c
        chat_template_tests.c
        chat_template_text.c
        chat_template_unicode.c
        chat_template_value.c
    LINKS choir_base PkgConfig::JANSSON PkgConfig::UTF8PROC m)
