choir_fuzz(options_fuzz SOURCES options_fuzz.c LINKS choir_base)
