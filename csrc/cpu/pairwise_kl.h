// CPU kernels of pairwise_kl and pairwise_kl_diversity: raw pointers and sizes. The maths is in kernels/pairwise_kl.py.
#pragma once

#include <cstdint>

namespace latent_engine {

template <class T>
struct Posteriors {
  int64_t N, D;
  const T *mu, *log_var;
  int64_t mu_strides[2], log_var_strides[2];
};

constexpr int64_t kPairDims = 16;  // dimensions of a block of the gradient of the deviation: a cache line

// The batch by dimension, [D][stride]: rows are padded to whole groups of 64 bytes, with σ² = 1 / σ² = 0.
template <class T>
struct PairColumns {
  int64_t stride;
  T *mu, *log_var, *var, *inverse;
};

// A weighted sum over ordered pairs, cut into D × splits tasks: one dimension, and `columns` of the second posteriors.
template <class T>
struct PairTasks {
  int64_t splits, columns;
  T scale;            // of the weights
  T* gradients;       // [splits][2][D][stride]: with respect to mu and log_var; null if not needed
};

template <class T>
struct PairwiseKlDiversity {
  Posteriors<T> batch;
  PairColumns<T> columns;
  PairTasks<T> tasks;
  double* sums;  // [D · splits]: Σ softplus(−KL_d) of each task
};

// Sums over the rows for each dimension, with m = μ − centre and w = 1 / σ²; the rows of the tensor `moments`.
enum Moment { centre, sum_m, sum_w, sum_mw, sum_v_m2, kMoments };

template <class T>
struct PairwiseKlMean {
  Posteriors<T> batch;
  T* moments;  // [kMoments][D]
  T* mean;     // [D]; forward
  const T *grad_mean, *grad_std, *unit;  // [D], [1] or null, [2][N][D] or null; backward
  int64_t grad_mean_stride;
  T *dmu, *dlog_var;  // [N][D]
};

// The deviation from the pair matrix [stride][stride], where N is of the order of D.
template <class T>
struct PairwiseKlDirect {
  Posteriors<T> batch;
  PairColumns<T> columns;
  T mean;             // of the total
  T unit, scale;      // of the deviations, so that their products with 1 / σ² do not overflow; of the gradients
  T* log_det;         // [stride]: Σ_d log σ² less that of the first posterior
  T* deviations;      // [stride][stride]: KL − mean by second posterior, 0 on the diagonal and in the padding
  T* sums;            // [stride]
  double* squares;    // [stride]: beyond float where deviations pass 1.8e19
  T* turned;          // [stride][stride]: the deviations by first posterior, times unit
  T* balance;         // [stride]
  T* gradients;       // [2][N][D]
};

// The deviation from Gram matrices of the features, where N is well above 4 D: 2 KL(i‖j) = a_i · b_j + r_i + c_j.
template <class T>
struct PairwiseKlGram {
  Posteriors<T> batch;
  const T* centre;                   // [D]
  int64_t width;                     // 2D, padded to whole groups
  double *a, *b;                     // [N padded to fours][width], centred
  double *a_mean, *b_mean;           // [width]
  double *r, *c;                     // [N]
  double *gram_a, *gram_b;           // [width][width]
  double mean, unit;                 // of 2 KL − T over all pairs; factor of the gradients
  double *row, *column;              // [N]: ρ and γ
  double *row_a, *column_b;          // [width]: Σ ρ ã, Σ γ b̃
  T *dmu, *dlog_var;                 // [N][D]
};

template <class T>
struct PairwiseKlKernels {
  void (*columns)(const Posteriors<T>&, const PairColumns<T>&, int64_t first, int64_t last);  // of dimensions
  void (*collect)(const Posteriors<T>&, const PairColumns<T>&, const PairTasks<T>&, T* gradients, int64_t first, int64_t last);

  void (*halves)(const Posteriors<T>&, const PairColumns<T>&, int64_t first, int64_t last);  // before `diversity`
  void (*diversity)(const PairwiseKlDiversity<T>&, int64_t task);

  void (*mean)(const PairwiseKlMean<T>&, int64_t first, int64_t last);           // of dimensions
  void (*mean_gradient)(const PairwiseKlMean<T>&, int64_t first, int64_t last);  // of rows

  void (*means)(const PairwiseKlMean<T>&, const PairColumns<T>&, int64_t first, int64_t last);  // of dimensions
  void (*log_dets)(const PairwiseKlDirect<T>&, int64_t first, int64_t last);  // of posteriors, whole groups
  void (*totals)(const PairwiseKlDirect<T>&, int64_t first, int64_t last);  // of second posteriors, whole groups
  void (*deviations)(const PairwiseKlDirect<T>&, T error, int64_t first, int64_t last);
  void (*turn)(const PairwiseKlDirect<T>&, int64_t first, int64_t last);             // of rows
  void (*direct_gradient)(const PairwiseKlDirect<T>&, int64_t first, int64_t last);  // of dimensions

  void (*gram_features)(const PairwiseKlGram<T>&, int64_t first, int64_t last);  // of rows
  void (*gram_columns)(const double* x, const double* weights, int64_t rows, int64_t width, double* out, int64_t first,
                       int64_t last);  // of features
  double (*gram_total)(const PairwiseKlGram<T>&, double r_mean, double c_mean);
  void (*gram_centre)(const PairwiseKlGram<T>&, double r_mean, double c_mean, int64_t first, int64_t last);
  void (*gram_products)(const PairwiseKlGram<T>&, int64_t first, int64_t last);  // of fours of features
  double (*gram_merge)(const PairwiseKlGram<T>&);
  void (*gram_gradient)(const PairwiseKlGram<T>&, int64_t first, int64_t last);  // of fours of rows
};

}  // namespace latent_engine
