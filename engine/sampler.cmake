choir_library(sampler
    SOURCES sampler.c candidates.c
    LINKS choir_base choir_kernels m)
