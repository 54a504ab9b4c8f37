// CPU kernels of the row updates: raw pointers and sizes. The maths is in kernels/row_update.py.
#pragma once

#include <cstdint>

namespace latent_engine {

// Rows of a [N, D] array, whose elements are next to one another.
template <class T>
struct RowArray {
  T* data;
  int64_t stride;

  T* operator[](int64_t row) const { return data + row * stride; }
};

// The distinct rows of a batch and the gradients of each: those of segment s are order[starts[s]] to order[starts[s + 1] − 1].
template <class T>
struct RowBatch {
  int64_t segments, D;
  const int64_t* rows;    // [segments], increasing; null: every row of the table
  const int64_t* starts;  // [segments + 1]; null: segment s has gradient s alone
  const int64_t* order;
  const T* grad;
  int64_t grad_stride;

  int64_t row(int64_t segment) const { return rows ? rows[segment] : segment; }
};

template <class T>
struct RowSgd {
  RowBatch<T> batch;
  RowArray<T> table, velocity;  // velocity.data is null without momentum
  T lr, momentum, coupled, kept;  // weight decay of the gradient; what decoupled weight decay leaves of a row
};

template <class T>
struct RowMoments {
  RowArray<T> table, mean, square;
  int32_t* step;  // [N], contiguous
};

template <class T>
struct RowAdam {
  RowBatch<T> batch;
  RowMoments<T> state;
  double lr, beta1, beta2, log_beta1, log_beta2;
  T eps, coupled, kept;
};

// The steps `first` to `now` of the table, of which entry t − first of each array is step t.
template <class T>
struct RowCatchUp {
  RowBatch<T> batch;  // without gradients
  RowMoments<T> state;
  const double *rates, *roots, *log_decays;  // lr / (1 − β1^t), 1 / √(1 − β2^t), Σ log(1 − lr λ) up to and with t
  int64_t first, now, terms;                 // moves after the first `terms` are below the rounding of their sum
  const double *mean_powers, *root_powers;   // [terms]: β1^j and β2^(j/2), j ≥ 1
  double beta1, beta2;
  T eps;
};

template <class T>
struct RowUpdateKernels {
  void (*sgd)(const RowSgd<T>&, int64_t first, int64_t last);  // segments
  void (*adam)(const RowAdam<T>&, int64_t first, int64_t last);
  void (*catch_up)(const RowCatchUp<T>&, int64_t first, int64_t last);
};

}  // namespace latent_engine
