# How every folder is built: the dialect, the warnings, the sanitizers, and three helper functions.
set(CMAKE_C_STANDARD 17)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
find_program(CCACHE ccache)
if(CCACHE)
    set(CMAKE_C_COMPILER_LAUNCHER ${CCACHE})
endif()

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(JANSSON REQUIRED IMPORTED_TARGET jansson)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(XXHASH REQUIRED IMPORTED_TARGET libxxhash)
pkg_check_modules(SQLITE3 REQUIRED IMPORTED_TARGET sqlite3)
pkg_check_modules(GRPC REQUIRED IMPORTED_TARGET grpc)
pkg_check_modules(LIBEVENT REQUIRED IMPORTED_TARGET libevent)
pkg_check_modules(PROTOBUF_C REQUIRED IMPORTED_TARGET libprotobuf-c)
if(CHOIR_TESTS)
    pkg_check_modules(CMOCKA REQUIRED IMPORTED_TARGET cmocka)
endif()

# -ffp-contract=off: fused multiply-adds are written out (fmaf, intrinsics), so that bits do not depend
# on the compiler's mood. Plain x86-64 code; the CPU levels set their own flags per file.
add_library(choir_flags INTERFACE)
target_compile_definitions(choir_flags INTERFACE _GNU_SOURCE)
target_include_directories(choir_flags INTERFACE ${CMAKE_SOURCE_DIR})
target_compile_options(choir_flags INTERFACE
    -Wall -Wextra -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wvla
    -Wno-missing-field-initializers -ffp-contract=off -fno-math-errno -fno-common
    $<$<BOOL:${CHOIR_WERROR}>:-Werror>)
# Checked code is many times its size: -O1, and lines without variables in the debug information, keep the
# compiler quick (one file of kernels took gcc 100 s at -O3 -g), and a report names its lines all the same.
if(CHOIR_SANITIZE)
    target_compile_options(choir_flags INTERFACE -fsanitize=${CHOIR_SANITIZE}
        -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1)
    target_link_options(choir_flags INTERFACE -fsanitize=${CHOIR_SANITIZE})
endif()

if(CHOIR_FUZZ)
    target_compile_options(choir_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()

# choir_library(NAME SOURCES … LINKS …): one folder, one static library, target choir_NAME.
function(choir_library name)
    cmake_parse_arguments(A "" "" "SOURCES;LINKS" ${ARGN})
    add_library(choir_${name} STATIC ${A_SOURCES})
    target_link_libraries(choir_${name} PUBLIC choir_flags ${A_LINKS})
endfunction()

# choir_test(NAME SOURCES … LINKS … [THREADED]): one cmocka program, run by ctest from the source tree's
# root, so that fixtures are found as tests/fixtures/…. THREADED: it starts threads, so the thread sanitizer
# takes it too: the target threaded_tests builds what `ctest -L threaded` runs.
if(CHOIR_TESTS)
    add_custom_target(threaded_tests)
endif()
function(choir_test name)
    cmake_parse_arguments(A "THREADED" "" "SOURCES;LINKS" ${ARGN})
    add_executable(${name} ${A_SOURCES})
    target_link_libraries(${name} PRIVATE choir_flags ${A_LINKS} PkgConfig::CMOCKA m)
    add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
    if(A_THREADED)
        set_tests_properties(${name} PROPERTIES LABELS threaded)
        add_dependencies(threaded_tests ${name})
    endif()
endfunction()

# choir_fuzz(NAME [SOURCES …] LINKS …): a libFuzzer target (clang only) of NAME.c and what else it needs;
# its seeds lie in tests/fuzz/seeds/NAME.
function(choir_fuzz name)
    if(NOT CHOIR_FUZZ)
        return()
    endif()
    cmake_parse_arguments(A "" "" "SOURCES;LINKS" ${ARGN})
    add_executable(${name} ${name}.c ${A_SOURCES})
    target_link_libraries(${name} PRIVATE choir_flags ${A_LINKS})
    target_compile_options(${name} PRIVATE -fsanitize=fuzzer)
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
endfunction()
