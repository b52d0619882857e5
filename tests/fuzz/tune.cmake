if(TARGET choir_tune)
    choir_fuzz(pack_fuzz SOURCES pack_fuzz.c LINKS choir_tune PkgConfig::XXHASH)
    choir_fuzz(usage_fuzz SOURCES usage_fuzz.c LINKS choir_tune)
endif()
