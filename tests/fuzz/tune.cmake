if(TARGET choir_tune)
    choir_fuzz(adapter_fuzz SOURCES adapter_fuzz.c LINKS choir_tune)
    choir_fuzz(pack_fuzz SOURCES pack_fuzz.c LINKS choir_tune PkgConfig::XXHASH)
endif()
