// CPU kernels of gmm_log_prob: raw pointers and sizes. The maths is in kernels/gmm.py.
#pragma once

#include <cstdint>

namespace latent_engine {

// Components of one register tile; the packed mixture is padded to whole tiles.
constexpr int64_t kGmmTile = 4;

// The N × K pairs are cut into row chunks × component splits, each one task. The cut depends on sizes only, and partial
// results are merged in order, so the bits do not depend on the number of threads.
struct GmmGrid {
  int64_t rows, chunks;        // rows a chunk
  int64_t components, splits;  // components a split, a multiple of kGmmTile

  int64_t tasks() const { return chunks * splits; }
};

template <class T>
struct GmmMixture {
  int64_t K, D;
  const T *means, *log_vars, *log_weights;
  int64_t means_strides[2], log_vars_strides[2], log_weights_stride;
  T* packed;     // [tiles][means, inverse variances][D][kGmmTile]
  T* constants;  // [tiles · kGmmTile]: log-weight minus the log-normaliser; −inf in the padding
};

template <class T>
struct GmmRows {
  int64_t N;
  const T* z;
  int64_t z_strides[2];
  const int64_t* labels;  // [N] or null; negative: every component; classes or above: none
  const bool* allowed;    // [classes, K] with labels, [N, K] without, or null; contiguous
  int64_t classes;
};

template <class T>
struct GmmForward {
  GmmMixture<T> mixture;
  GmmRows<T> rows;
  GmmGrid grid;
  T* log_prob;          // [N]
  T* responsibilities;  // [N, K] or null; needs splits == 1
  T *maxima, *sums;     // [splits, N] where splits > 1
};

template <class T>
struct GmmBackward {
  GmmMixture<T> mixture;
  GmmRows<T> rows;
  GmmGrid grid;
  const T* grad;  // [N], with its stride
  int64_t grad_stride;
  const T* log_prob;  // [N]; null if it is to be computed
  T* value;           // [N], the computed one, or null; needs splits == 1 and no coef
  const T* coef;      // [N, K] or null
  T* dz;              // [N, D]; null if not needed
  T* dz_parts;        // [splits − 1, N, D], those of the later splits
  T* moments;         // [chunks, tiles, kGmmTile · (2D + 1)], null if not needed
  T *dmeans, *dlog_vars, *dlog_weights;
  bool plain;  // Σ a δ and Σ a δ² go to dmeans and dlog_vars instead of the gradients
};

template <class T>
struct GmmKernels {
  void (*pack)(const GmmMixture<T>&, int64_t first, int64_t last);            // tiles [first, last)
  void (*forward)(const GmmForward<T>&, int64_t task);
  void (*merge_forward)(const GmmForward<T>&);  // where splits > 1
  void (*backward)(const GmmBackward<T>&, int64_t task);
  void (*merge_rows)(const GmmBackward<T>&, int64_t first, int64_t last);     // values [first, last) of dz
  void (*merge_mixture)(const GmmBackward<T>&, int64_t first, int64_t last);  // tiles [first, last)
};

}  // namespace latent_engine
