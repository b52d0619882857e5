# A family is one file: the list of them is made of the definitions in families/.
file(GLOB families CONFIGURE_DEPENDS families/*.c)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${families})
set(family_list "#define FAMILIES(X)")
foreach(file ${families})
    file(STRINGS ${file} definitions REGEX "^const choir_family choir_family_")
    foreach(definition ${definitions})
        string(REGEX REPLACE "^const choir_family choir_family_([a-z0-9_]+) .*" " X(\\1)" name ${definition})
        string(APPEND family_list "${name}")
    endforeach()
endforeach()
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/families_list.h CONTENT "${family_list}\n" @ONLY)

choir_library(model_file
    SOURCES adapter_bottleneck.c adapter_file.c adapter_gguf.c adapter_lora.c adapter_pair.c adapter_pairs.c
            adapter_pattern.c adapter_peft.c adapter_place.c adapter_prompt.c adapter_saved.c adapter_vectors.c gguf.c gguf_config.c hf_config.c model_config.c model_file.c pack_file.c roles.c safetensors.c texts.c ${families}
    LINKS choir_base choir_kernels choir_experts PkgConfig::JANSSON PkgConfig::PCRE2 PkgConfig::XXHASH m)
target_include_directories(choir_model_file PRIVATE ${CMAKE_CURRENT_BINARY_DIR})
