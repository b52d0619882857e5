/* The gates an upcycled model starts with; internal to tune/. */
#pragma once
#include "tune/tune.h"

/* gates: [n_layers, n_experts + 1, hidden]; expert 0 is the base. With h the input of the MLP, mu_e its mean
 * over sample text e and c the mean of the mu_e: W_e = sharpness * unit(mu_e - c made orthogonal to c), so
 * that a gate without bias asks which text's mean a hidden state leans towards. */
choir_status make_gates(const choir_upcycle_options *options, const choir_model_config *base, float *gates)
    CHOIR_MUST_USE;
