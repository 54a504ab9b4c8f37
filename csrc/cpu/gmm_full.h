// CPU kernels of gmm_full_log_prob and gmm_full_moments: raw pointers and sizes. The maths is in kernels/gmm_full.py.
#pragma once

#include "gmm.h"

namespace latent_engine {

constexpr int64_t kFullTile = 4;  // dimensions of a register tile

template <class T>
struct GmmFullMixture {
  int64_t K, D;
  const T *means, *chol, *log_weights;  // contiguous; chol is read from the diagonal up
  T* constants;                         // [K]: log-weight plus the logarithm of the normaliser

  // Sums of one component: Σ a, Σ a δ [D], padded to whole tiles, and the tiles of Σ a δ δᵀ from the diagonal up.
  int64_t moments_size() const {
    const int64_t whole = (D + kFullTile - 1) / kFullTile * kFullTile;
    return 1 + whole + whole * (whole + kFullTile) / 2;
  }
};

template <class T>
struct GmmFullForward {
  GmmFullMixture<T> mixture;
  GmmRows<T> rows;
  GmmGrid grid;         // one split
  T* log_prob;          // [N]
  T* responsibilities;  // [N, K] or null
};

template <class T>
struct GmmFullBackward {
  GmmFullMixture<T> mixture;
  GmmRows<T> rows;
  GmmGrid grid;
  const T* grad;  // [N], with its stride; null for ones
  int64_t grad_stride;
  const T* log_prob;  // [N]; null if it is to be computed
  T* value;           // [N], the computed one, or null; needs one split, and neither coef nor dz
  const T* coef;      // [N, K] or null
  T* dz;              // [N, D]; null if not needed
  T* dz_parts;        // [splits − 1, N, D], those of the later splits
  double* moments;    // [chunks, K, moments_size], null if not needed
  double *weight, *first, *second;  // [K], [K, D], [K, D, D]
};

template <class T>
struct GmmFullKernels {
  void (*prepare)(const GmmFullMixture<T>&, int64_t first, int64_t last);  // constants [first, last)
  void (*forward)(const GmmFullForward<T>&, int64_t task);
  void (*backward)(const GmmFullBackward<T>&, int64_t task);
  void (*merge_rows)(const GmmFullBackward<T>&, int64_t first, int64_t last);     // values [first, last) of dz
  void (*merge_moments)(const GmmFullBackward<T>&, int64_t first, int64_t last);  // components [first, last)
};

}  // namespace latent_engine
