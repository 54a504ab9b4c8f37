// CPU kernels of reparametrised samples and their KL divergence: raw pointers and sizes. The maths is in
// kernels/reparametrize.py.
#pragma once

#include <cstdint>

namespace latent_engine {

// Samples of [N, D] elements, or of the elements themselves, in rows whose elements are next to one another.
template <class T>
struct ReparametrizeArray {
  const T* data;  // null if there is none
  int64_t stride_s, stride_n;

  const T* at(int64_t s, int64_t n) const { return data + s * stride_s + n * stride_n; }
  bool is_dense(int64_t D) const { return !data || stride_n == D; }  // rows lie next to one another, too
};

template <class T>
struct ReparametrizeInputs {
  int64_t S, N, D;
  ReparametrizeArray<T> mean, log_var, noise;
  const int64_t* keys;  // [S], from which the noise is made, or null
};

template <class T>
struct ReparametrizeForward {
  ReparametrizeInputs<T> inputs;
  T *z, *kl;                         // [S, N, D], [N, D]
  bool z_past_cache, kl_past_cache;  // too large for the caches, aligned, and their rows are whole groups
};

template <class T>
struct ReparametrizeBackward {
  ReparametrizeInputs<T> inputs;
  ReparametrizeArray<T> grad_z, grad_kl;
  bool grad_kl_is_shared;  // by the elements of a row, or where its stride is 0 by all
  T *dmean, *dlog_var;     // [N, D] or null
  bool past_cache;         // both
};

template <class T>
struct ReparametrizeKernels {
  void (*forward)(const ReparametrizeForward<T>&, int64_t first, int64_t last);  // rows
  void (*backward)(const ReparametrizeBackward<T>&, int64_t first, int64_t last);
};

}  // namespace latent_engine
