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

constexpr int64_t kPairDims = 16;  // dimensions of a block of columns: a cache line
constexpr int64_t kPairTile = 4;   // second posteriors that share what is loaded of a first one
constexpr int64_t kPairRun = 32;   // lines of dimensions that are added up before they join the total: 24 KB of a tile

// The batch by dimension, [D][stride]: rows are padded to whole groups of 64 bytes, with σ² = 1 / σ² = 0.
template <class T>
struct PairColumns {
  int64_t stride;
  T *mu, *log_var, *var, *inverse;
};

// A weighted sum over ordered pairs, cut into D × splits tasks: one dimension, and `columns` of the second posteriors. Or into
// lines × splits: a cache line of dimensions.
template <class T>
struct PairTasks {
  int64_t splits, columns;
  T scale;            // of the weights
  T* gradients;       // [splits][2][D or lines][stride]: with respect to mu and log_var; null if not needed
};

template <class T>
struct PairwiseKlDiversity {
  Posteriors<T> batch;
  PairColumns<T> columns;
  PairTasks<T> tasks;
  double* sums;  // [D · splits] or [lines · splits]: Σ softplus(−KL_d) of each task
  T* gradients;  // [2][N][D] or null
};

// Sums over the rows for each dimension, with m = μ − centre and w = 1 / σ²; the rows of the tensor `moments`.
enum Moment { centre, sum_m, sum_w, sum_mw, sum_v_m2, kMoments };

// Sums over the rows of m, v, w, m w, m² and m² w, which the means are made of, and of log v.
enum MomentSum { of_m, of_v, of_w, of_mw, of_m2, of_m2w, kMeanSums, of_level = kMeanSums, kMomentSums };
constexpr int64_t kMomentColumns = 64;  // dimensions of a task of these sums

template <class T>
struct PairwiseKlMean {
  Posteriors<T> batch;
  T* moments;    // [kMoments][D]
  T* mean;       // [D]; forward
  int64_t rows;  // of a part of the batch
  double* sums;  // [parts][kMomentSums][D], log v against the first row
  const T *grad_mean, *grad_std, *unit;  // [D], [1] or null, [2][N][D] or null; backward
  int64_t grad_mean_stride;
  T *dmu, *dlog_var;  // [N][D]
};

// The posteriors in lines of 64 bytes of dimensions, from the line `first` on: [tiles of kPairTile posteriors][pitch lines]
// [kPairTile][3][64 bytes], μ, σ² and 1 / σ², 0 from N on. Where the pitch is odd a tile and the next lie in different sets
// of the cache.
template <class T>
struct PairValues {
  static constexpr int64_t kSize = 3 * 64 / sizeof(T);
  T* data;
  int64_t first, pitch;

  static int64_t size(int64_t N, int64_t pitch) { return (N + kPairTile - 1) / kPairTile * kPairTile * pitch * kSize; }
  T* at(int64_t i, int64_t line) const {
    return data + ((i / kPairTile * pitch + line - first) * kPairTile + i % kPairTile) * kSize;
  }
};

// The deviation from the pair matrix [stride][stride], where N is of the order of D.
template <class T>
struct PairwiseKlDirect {
  Posteriors<T> batch;
  int64_t stride;  // N, padded to whole groups of 64 bytes
  T mean;          // of the total
  T unit, scale;   // of the deviations, so that their products with 1 / σ² do not overflow; of the gradients
  T* log_det;      // [stride]: Σ_d log σ² less that of the first posterior
  int64_t parts;   // of the dimensions
  T* deviations;   // [parts][stride][stride]: totals of each part by second posterior; of them the first becomes KL − mean,
                   // 0 on the diagonal and in the padding
  T* sums;         // [stride]
  double* squares; // [stride]: beyond float where deviations pass 1.8e19
  T* gradients;    // [2][N][D]
};

constexpr int64_t kGramTile = 8;    // features, or rows, of a product
constexpr int64_t kGramBlock = 32;  // rows whose gradients take the Gram matrices at once

// The deviation from Gram matrices of the features, where N is well above 4 D: 2 KL(i‖j) = a_i · b_j + r_i + c_j.
template <class T>
struct PairwiseKlGram {
  Posteriors<T> batch;
  const T* centre;                   // [D]
  bool need_gradients;
  int64_t width, stride;             // 2D, padded to whole tiles; of a row: an odd number of cache lines, which lie in
                                     // different sets of the cache
  int64_t rows, parts;               // of a part of the batch; of them
  double* sums;                      // [parts][GramSums::size]
  double *level;                     // [D]: log σ² of the first row
  double *a_mean, *b_mean;           // [width]
  double r_mean, c_mean;             // of r and of c + D, with log σ² against `level`
  double *inner;                     // [width]: parts of the inner product of the Gram matrices
  double mean, unit;                 // of 2 KL − T over all pairs; factor of the gradients
  T *dmu, *dlog_var;                 // [N][D]
};

// Sums over a part of the rows.
struct GramSums {
  double *gram_a, *gram_b;   // [width][stride]: Σ ã ãᵀ, Σ b̃ b̃ᵀ, from the tile on the diagonal on
  double *row_a, *column_b;  // [width]: Σ ρ ã, Σ γ b̃
  double* squares;           // [1]: Σ (ρ² + γ²)

  static int64_t size(int64_t width, int64_t stride) { return 2 * width * (stride + 1) + 8; }

  template <class T>
  GramSums(const PairwiseKlGram<T>& p, int64_t part)
      : gram_a(p.sums + part * size(p.width, p.stride)), gram_b(gram_a + p.width * p.stride),
        row_a(gram_b + p.width * p.stride), column_b(row_a + p.width), squares(column_b + p.width) {}
};

template <class T>
struct PairwiseKlKernels {
  void (*columns)(const Posteriors<T>&, const PairColumns<T>&, int64_t first, int64_t last);  // of dimensions
  void (*collect)(const Posteriors<T>&, const PairColumns<T>&, const PairTasks<T>&, T* gradients, int64_t first, int64_t last);

  void (*halves)(const Posteriors<T>&, const PairColumns<T>&, int64_t first, int64_t last);  // before `diversity`
  void (*diversity)(const PairwiseKlDiversity<T>&, int64_t task);
  void (*lines_diversity)(const PairwiseKlDiversity<T>&, int64_t task);
  void (*lines_collect)(const PairwiseKlDiversity<T>&, int64_t first, int64_t last);  // of rows, where there are splits

  void (*moments)(const PairwiseKlMean<T>&, int64_t part, int64_t first, int64_t last);  // of dimensions
  void (*mean)(const PairwiseKlMean<T>&, int64_t first, int64_t last);           // of dimensions
  void (*mean_gradient)(const PairwiseKlMean<T>&, int64_t first, int64_t last);  // of rows

  void (*pack)(const Posteriors<T>&, const PairValues<T>&, int64_t first, int64_t last, double* log_det);  // a run at most
  void (*means)(const PairwiseKlMean<T>&, const PairValues<T>&, int64_t line);
  // Of a run at most, and of first posteriors, whole tiles.
  void (*totals)(const PairValues<T>&, int64_t begin, int64_t end, int64_t first, int64_t last, bool add, T* totals,
                 int64_t stride);
  void (*divergences)(const PairwiseKlDirect<T>&, int64_t first, int64_t last);  // of second posteriors
  void (*deviations)(const PairwiseKlDirect<T>&, T error, int64_t first, int64_t last);
  void (*direct_gradient)(const PairwiseKlDirect<T>&, int64_t first, int64_t last);  // of lines

  double (*gram_means)(PairwiseKlGram<T>&, const double* sums);
  void (*gram_part)(const PairwiseKlGram<T>&, int64_t part);
  void (*gram_sums)(const PairwiseKlGram<T>&, int64_t first, int64_t last);  // of features, whole tiles
  double (*gram_total)(const PairwiseKlGram<T>&, double mean);
  void (*gram_gradient)(const PairwiseKlGram<T>&, int64_t first, int64_t last);  // of blocks of rows
};

}  // namespace latent_engine
