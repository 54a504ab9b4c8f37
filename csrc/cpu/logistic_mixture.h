// CPU kernels of logistic_mixture_log_prob: raw pointers and sizes. The maths is in kernels/logistic_mixture.py.
#pragma once

#include <cstdint>

namespace latent_engine {

// Pixels of a task: 20 µs at ten components and three channels. Each gives one partial sum of the log-likelihood.
constexpr int64_t kLogisticPart = 512;

template <class T>
struct LogisticMixture {
  int64_t images, N, C, K, P;  // image i of the parameters has the pixels of image i mod N
  const T* x;                  // [N, C, P]
  const T* params;             // [images, rows · K, P]
  const bool* mask;            // [N, P] or null: the pixels that count

  int64_t planes() const { return (C == 3 ? 10 : 3) * K; }
  int64_t parts() const { return (P + kLogisticPart - 1) / kLogisticPart; }
};

template <class T>
struct LogisticMixtureForward {
  LogisticMixture<T> in;
  T* sums;   // [images, parts]
  T* stats;  // [images, 4, P] or null; see kernels/logistic_mixture.py
};

template <class T>
struct LogisticMixtureBackward {
  LogisticMixture<T> in;
  const T* grad;  // [images], with its stride
  int64_t grad_stride;
  const T* stats;  // [images, 4, P]
  T* dparams;      // [images, rows · K, P]
  bool past_cache;  // dparams is too large for the caches, aligned, and its rows are whole groups
};

// Parts [first, last) of images · parts.
template <class T>
struct LogisticMixtureKernels {
  void (*forward)(const LogisticMixtureForward<T>&, int64_t first, int64_t last);
  void (*backward)(const LogisticMixtureBackward<T>&, int64_t first, int64_t last);
};

}  // namespace latent_engine
