// The row updates on CUDA; the maths is in kernels/row_update.py. A thread has one element of a row, or every lanes-th. The
// index is sorted: the first position of each row sums that row's gradients and writes it, so nothing is added atomically.
#pragma once

#include "launch.cuh"

namespace latent_engine::row_update {

// Rows of a [N, D] array, whose elements are next to one another.
struct Rows {
  float* data;
  int64_t stride;

  __device__ float& at(int64_t row, int64_t d) const { return data[row * stride + d]; }
};

struct Batch {
  int64_t count, D;
  const int64_t *index, *order;  // sorted, and the positions of its gradients; index null: every row once
  const float* grad;
  int64_t grad_stride;
  int lanes;  // threads a row, a power of two

  Batch(int64_t count_, int64_t D_, const int64_t* index_, const int64_t* order_, const float* grad_, int64_t grad_stride_)
      : count(count_), D(D_), index(index_), order(order_), grad(grad_), grad_stride(grad_stride_), lanes(1) {
    while (lanes < D && lanes < THREADS) lanes *= 2;
  }
  __device__ int64_t row(int64_t s) const { return index ? index[s] : s; }
  __device__ bool is_first(int64_t s) const { return s < count && (!index || s == 0 || index[s] != index[s - 1]); }
  __device__ float gradient(int64_t s, int64_t d) const {
    float sum = grad[order[s] * grad_stride + d];
    for (int64_t j = s + 1; j < count && index[j] == index[s]; ++j) sum += grad[order[j] * grad_stride + d];
    return sum;
  }
  dim3 blocks() const { return grid(tiles_of(count, THREADS / lanes)); }
};

// Calls f(s, d) for each element of the rows that begin at this block's positions.
template <class F>
__device__ void for_each_element(const Batch& b, const F& f) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * (THREADS / b.lanes) + threadIdx.x / b.lanes;
  if (!b.is_first(s)) return;
  for (int64_t d = threadIdx.x % b.lanes; d < b.D; d += b.lanes) f(s, d);
}

struct Sgd {
  Rows table, velocity;  // velocity.data is null without momentum
  float lr, momentum, coupled, kept;
};

__global__ void __launch_bounds__(THREADS) sgd(Batch b, Sgd p) {
  for_each_element(b, [&](int64_t s, int64_t d) {
    const int64_t row = b.row(s);
    const float point = p.table.at(row, d);
    float move = -p.lr * (b.gradient(s, d) + p.coupled * point);
    if (p.velocity.data) {
      move += p.momentum * p.velocity.at(row, d);
      p.velocity.at(row, d) = move;
    }
    p.table.at(row, d) = point * p.kept + move;
  });
}

struct Moments {
  Rows table, mean, square;
  int32_t* step;
};

struct Adam {
  Moments state;
  double lr, beta1, beta2;
  float eps, coupled, kept;
};

__global__ void __launch_bounds__(THREADS) adam(Batch b, Adam p) {
  for_each_element(b, [&](int64_t s, int64_t d) {
    const int64_t row = b.row(s);
    const double t = p.state.step[row] + 1;
    const float rate = static_cast<float>(p.lr / (1 - pow(p.beta1, t))), root = static_cast<float>(sqrt(1 - pow(p.beta2, t)));
    const float point = p.state.table.at(row, d), g = b.gradient(s, d) + p.coupled * point;
    const float beta1 = static_cast<float>(p.beta1), beta2 = static_cast<float>(p.beta2);
    const float m = beta1 * p.state.mean.at(row, d) + static_cast<float>(1 - p.beta1) * g;
    const float v = beta2 * p.state.square.at(row, d) + static_cast<float>(1 - p.beta2) * g * g;
    p.state.mean.at(row, d) = m;
    p.state.square.at(row, d) = v;
    p.state.table.at(row, d) = point * p.kept - rate * m / (sqrtf(v) / root + p.eps);
  });
}

// After `adam`, whose threads all read the count of their row.
__global__ void __launch_bounds__(THREADS) count_step(Batch b, int32_t* step) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (b.is_first(s)) ++step[b.row(s)];
}

// The steps `first` to `now`; see RowCatchUp of csrc/cpu/row_update.h.
struct CatchUp {
  Moments state;
  const double *rates, *roots, *log_decays;
  int64_t first, now, terms;
  double beta1, beta2;
  float eps;
};

__global__ void __launch_bounds__(THREADS) catch_up(Batch b, CatchUp p) {
  for_each_element(b, [&](int64_t s, int64_t d) {
    const int64_t row = b.row(s), since = p.state.step[row], skipped = p.now - since;
    if (skipped <= 0) return;
    const int64_t count = skipped < p.terms ? skipped : p.terms, at = since + 1 - p.first;
    const double decay = p.log_decays[p.now - p.first], root_beta2 = sqrt(p.beta2);
    const float m = p.state.mean.at(row, d), v = p.state.square.at(row, d), root = sqrtf(v);
    float sum = 0.f;
    double mean_power = 1, root_power = 1;
    for (int64_t j = 0; j < count && m != 0; ++j) {
      mean_power *= p.beta1, root_power *= root_beta2;
      const float left = expf(static_cast<float>(decay - p.log_decays[at + j]));
      const float weight = static_cast<float>(p.rates[at + j] * mean_power) * left;
      sum += weight / (root * static_cast<float>(p.roots[at + j] * root_power) + p.eps);
    }
    const float kept = expf(static_cast<float>(decay - (since < p.first ? 0 : p.log_decays[since - p.first])));
    p.state.table.at(row, d) = p.state.table.at(row, d) * kept - m * sum;
    p.state.mean.at(row, d) = static_cast<float>(m * pow(p.beta1, static_cast<double>(skipped)));
    p.state.square.at(row, d) = static_cast<float>(v * pow(p.beta2, static_cast<double>(skipped)));
  });
}

// After `catch_up`, whose threads all read the count of their row.
__global__ void __launch_bounds__(THREADS) set_step(Batch b, int32_t* step, int32_t now) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (b.is_first(s) && step[b.row(s)] < now) step[b.row(s)] = now;
}

inline void run_sgd(const Batch& b, const Sgd& p, cudaStream_t stream) {
  if (b.count && b.D) launch(sgd, b.blocks(), 0, stream, b, p);
}

inline void run_adam(const Batch& b, const Adam& p, cudaStream_t stream) {
  if (!b.count || !b.D) return;
  launch(adam, b.blocks(), 0, stream, b, p);
  launch(count_step, grid(tiles_of(b.count, THREADS)), 0, stream, b, p.state.step);
}

inline void run_catch_up(const Batch& b, const CatchUp& p, cudaStream_t stream) {
  if (!b.count || !b.D || p.now < p.first) return;
  launch(catch_up, b.blocks(), 0, stream, b, p);
  launch(set_step, grid(tiles_of(b.count, THREADS)), 0, stream, b, p.state.step, static_cast<int32_t>(p.now));
}

}  // namespace latent_engine::row_update
