// The CPU kernels of every op at every instruction-set level; one isa_<level>.cpp defines each namespace.
#pragma once

#include "gmm.h"
#include "gmm_full.h"
#include "importance.h"
#include "isa.h"
#include "likelihood.h"
#include "logistic_mixture.h"
#include "mmd.h"
#include "mmd_normal.h"
#include "pairwise_kl.h"
#include "reparametrize.h"
#include "row_update.h"

namespace latent_engine {

// y = exp x or log x over n values, for the accuracy tests; the pace of arithmetic in registers, see probe.inl.
template <class T>
struct MathKernels {
  void (*exp)(const T* x, T* y, int64_t n);
  void (*log)(const T* x, T* y, int64_t n);
  int64_t (*arithmetic)(int64_t rounds, T* out);
};

template <class T>
struct Kernels {
  MathKernels<T> math;
  GmmKernels<T> gmm;
  GmmFullKernels<T> gmm_full;
  PairwiseKlKernels<T> pairwise_kl;
  MmdKernels<T> mmd;
  NormalMmdKernels<T> mmd_normal;
  ImportanceKernels<T> importance;
  LikelihoodKernels<T> likelihood[kLikelihoods];
  LogisticMixtureKernels<T> logistic_mixture;
  ReparametrizeKernels<T> reparametrize;
  RowUpdateKernels<T> row_update;
};

#define LATENT_DECLARE_LEVEL(level)       \
  namespace level {                       \
  extern const Kernels<float> kernels_f;  \
  extern const Kernels<double> kernels_d; \
  }
LATENT_DECLARE_LEVEL(base)
LATENT_DECLARE_LEVEL(avx2)
LATENT_DECLARE_LEVEL(avx512)
#undef LATENT_DECLARE_LEVEL

// Those of the level in use.
template <class T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  static const Kernels<float>* const levels[] = {&base::kernels_f, &avx2::kernels_f, &avx512::kernels_f};
  return *levels[static_cast<int>(isa())];
}
template <>
inline const Kernels<double>& kernels<double>() {
  static const Kernels<double>* const levels[] = {&base::kernels_d, &avx2::kernels_d, &avx512::kernels_d};
  return *levels[static_cast<int>(isa())];
}

}  // namespace latent_engine
