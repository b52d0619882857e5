choir_library(tokenizer
    SOURCES
        tokenizer.c
        tokenizer_added.c
        tokenizer_bpe.c
        tokenizer_cache.c
        tokenizer_decode.c
        tokenizer_gguf.c
        tokenizer_json.c
        tokenizer_normalize.c
        tokenizer_pattern.c
        tokenizer_regex.c
        tokenizer_split.c
        tokenizer_unicode.c
        tokenizer_vocab.c
    LINKS choir_model_file choir_base PkgConfig::PCRE2 PkgConfig::UTF8PROC PkgConfig::JANSSON
        PkgConfig::XXHASH)
