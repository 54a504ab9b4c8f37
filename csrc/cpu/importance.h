// CPU kernels of the importance ops: raw pointers and sizes. The maths is in kernels/importance.py.
#pragma once

#include <cstdint>

namespace latent_engine {

// [first, last) of samples or data points.
struct Range {
  int64_t first, last;
};

// q(z|x) and the prior, packed for the kernels.
template <class T>
struct ImportanceModel {
  int64_t N, D, padded;  // D padded to whole groups of 64 bytes
  const T *mu, *log_var;
  int64_t mu_strides[2], log_var_strides[2];
  bool normal_prior;  // N(0, I), else its log-density is given
  T* packed;          // [N][means, inverse variances][padded], zero in the padding
  T* constants;       // [N]: ½ Σ log_var, and ½ D log 2π with a given prior
};

// Everything is contiguous.
template <class T>
struct ImportanceSamples {
  int64_t S;
  const T *z, *log_px, *log_pz;  // [S, N, D], [S, N], [S, N] or null
  T* log_w;                      // [S, N]
};

// Moments of a block of log-weights by column, [4][stride] with the columns padded to whole groups: the largest sign · log w,
// m; Σ e and Σ e² with e = exp(scale · (sign · log w − m)); Σ log w.
constexpr int64_t kImportanceMoments = 4;

// How a Rényi bound weighs log w: sign · log w, to the power of scale = |1 − α|; the largest only where scale is infinite.
template <class T>
struct ImportanceOrder {
  T sign, scale;
};

// Moments of one group of samples, and what they make of the bound.
template <class T>
struct ImportanceBound {
  int64_t N, S, stride, groups, blocks;  // blocks a group
  ImportanceOrder<T> order;
  T elbo_weight;
  T* moments;  // [groups, blocks, 4, stride]; the first block of each group becomes that of the group
  T* centres;  // [groups, stride], what the excess is measured from; null where the bound needs no correction
  T* bound;    // [N]
};

template <class T>
struct ImportanceGradient {
  ImportanceModel<T> model;
  int64_t S, rows;       // rows a chunk
  const T *z, *weights;  // [S, N, D], [S, N]
  const T* grad;         // [N] with its stride, or null: the weights are the gradient
  int64_t grad_stride;
  T* dlog_w;              // [S, N]; null without grad
  T* dz;                  // [S, N, D] or null
  bool past_cache;        // dz is too large for the cache, aligned, and its rows are whole groups
  T* sums;                // [chunks, N, 2 · padded + 1]: Σ c δ/σ², Σ c δ²/σ², Σ c over samples; null if not needed
  T *dmu, *dlog_var;      // [N, D]
};

template <class T>
struct ImportanceKernels {
  void (*pack)(const ImportanceModel<T>&, int64_t first, int64_t last);  // data points
  void (*log_weights)(const ImportanceModel<T>&, const ImportanceSamples<T>&, Range rows, Range points);
  void (*moments)(const T* log_w, int64_t rows, int64_t N, ImportanceOrder<T>, T* moments, int64_t stride);
  void (*wide_moments)(const T* log_w, int64_t rows, int64_t N, ImportanceOrder<double>, double* moments, int64_t stride);
  void (*merge)(T* moments, int64_t blocks, int64_t stride, T scale);  // into the first
  void (*bound)(const ImportanceBound<T>&);
  // The correction of a bound next to the ELBO: Σ exp(scale · (sign · log w − centre)) − 1 of the rows of a block in the place
  // of its Σ e², then of all blocks into the bound.
  void (*excess)(const ImportanceBound<T>&, const T* centre, const T* log_w, int64_t rows, T* moments);
  void (*correct)(const ImportanceBound<T>&);
  // rows of one group into ∂bound / ∂log w
  void (*weights)(const ImportanceBound<T>&, const T* moments, const T* log_w, int64_t rows, T* weights);
  void (*backward)(const ImportanceGradient<T>&, int64_t chunk, Range points);
  void (*merge_backward)(const ImportanceGradient<T>&, int64_t first, int64_t last);  // data points
};

}  // namespace latent_engine
