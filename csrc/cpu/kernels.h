// The CPU kernels of every op at every instruction-set level; one isa_<level>.cpp defines each namespace.
#pragma once

#include "gmm.h"
#include "isa.h"

namespace latent_engine {

// y = exp x or log x over n values, for the accuracy tests.
template <class T>
struct MathKernels {
  void (*exp)(const T* x, T* y, int64_t n);
  void (*log)(const T* x, T* y, int64_t n);
};

#define LATENT_DECLARE_LEVEL(level)        \
  namespace level {                        \
  extern const MathKernels<float> math_f;  \
  extern const MathKernels<double> math_d; \
  extern const GmmKernels<float> gmm_f;    \
  extern const GmmKernels<double> gmm_d;   \
  }
LATENT_DECLARE_LEVEL(base)
LATENT_DECLARE_LEVEL(avx2)
LATENT_DECLARE_LEVEL(avx512)
#undef LATENT_DECLARE_LEVEL

}  // namespace latent_engine
