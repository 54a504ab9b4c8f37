// Kernels of pairwise_kl and pairwise_kl_diversity, and their launches; notation and formulas are in kernels/pairwise_kl.py.
// Everything is on raw pointers; `workspace(count)` gives that many floats, which live until the stream has run.
//
// The batch lies by dimension, [D][N]. Gradients are sums over pairs of weights g_ij of KL_d(i‖j), in the two roles of a
// posterior: one thread for each first one i, which takes the others one after the other, and one warp for each second one j,
// its lanes over the first ones. The weights are made twice, so that every sum has one owner and one order.
#pragma once

#include <cmath>
#include <cstdint>

#include "launch.cuh"

namespace latent_engine::pairwise_kl {

constexpr int ROUND = 64;   // terms summed before they join the running sum; factors of a product below 2^64
constexpr int TILE = 4;     // second posteriors of a thread in `deviations`
constexpr int WARPS = THREADS / 32;
constexpr int SUMS = 3;     // Σ g, Σ g w, Σ g w δ of a first posterior; Σ g, Σ g δ, Σ g p of a second one
constexpr int MOMENTS = 5;  // centre, Σ m, Σ w, Σ m w, Σ (v + m²)

struct Batch {
  const float *mu, *log_var;  // strided [N, D]
  int64_t mu_strides[2], log_var_strides[2];
  int64_t N, D;
};

struct Columns {  // [D][N]
  float *mu, *log_var, *var, *inverse;
};

// One dimension.
struct Column {
  const float *mu, *log_var, *var, *inverse;

  __device__ Column(const Columns& c, int64_t N, int64_t d)
      : mu(c.mu + d * N), log_var(c.log_var + d * N), var(c.var + d * N), inverse(c.inverse + d * N) {}
};

// Tiles of first posteriors.
__host__ __device__ inline int64_t row_tiles_of(int64_t N) { return (N + THREADS - 1) / THREADS; }

__device__ inline int64_t thread_number() { return static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; }

template <class T>
__device__ T warp_sum(T value) {
  for (int w = 1; w < 32; w *= 2) value += from_lane_xor(value, w);
  return value;
}

__global__ void prepare(Batch b, Columns c) {
  const int64_t at = thread_number();
  if (at >= b.N * b.D) return;
  const int64_t n = at % b.N, d = at / b.N;
  const float log_var = b.log_var[n * b.log_var_strides[0] + d * b.log_var_strides[1]];
  c.mu[at] = b.mu[n * b.mu_strides[0] + d * b.mu_strides[1]];
  c.log_var[at] = log_var, c.var[at] = expf(log_var), c.inverse[at] = expf(-log_var);
}

// Weights of Σ softplus(−KL_d): e / (1 + e) with e = exp(−KL_d), 0 for a posterior with itself.
struct Softplus {
  __device__ static float term(const Column& c, int64_t i, int64_t j, float p) {
    return i == j ? 0.f : expf(0.5f * (c.log_var[i] - c.log_var[j] + 1.f - p * c.inverse[j]));
  }
  __device__ float weight(float e, int64_t, int64_t) const { return e / (1.f + e); }
};

// Weights that are in memory, [j − first][N].
struct Given {
  const float* weights;
  int64_t first, N;

  __device__ static float term(const Column&, int64_t, int64_t, float) { return 0.f; }
  __device__ float weight(float, int64_t i, int64_t j) const { return weights[(j - first) * N + i]; }
};

// Blocks: tiles of first posteriors × dimensions × splits of the second ones, of which `first` to `last` are visited. Sums
// [splits][SUMS][D][N] if asked for, added to what is there if `add`; Σ log(1 + e) a warp in `values` unless null.
template <class Weights>
__global__ void __launch_bounds__(THREADS) first_role(Columns columns, Weights weights, int64_t N, int64_t D, int64_t first,
                                                      int64_t last, int64_t share, bool add, float* sums, float* values) {
  const int64_t i = thread_number(), d = blockIdx.y, split = blockIdx.z;
  const Column c(columns, N, d);
  const int64_t begin = first + split * share, end = begin + share < last ? begin + share : last;
  const float mu = i < N ? c.mu[i] : 0.f, var = i < N ? c.var[i] : 0.f;
  float total[SUMS] = {}, value = 0.f;
  for (int64_t j0 = begin; j0 < end && i < N; j0 += ROUND) {
    float part[SUMS] = {}, q = 0.f;
    const int64_t stop = j0 + ROUND < end ? j0 + ROUND : end;
#pragma unroll 4
    for (int64_t j = j0; j < stop; ++j) {
      const float delta = mu - c.mu[j], p = fmaf(delta, delta, var), e = Weights::term(c, i, j, p);
      q = fmaf(q, e, q + e);
      if (!sums) continue;
      const float g = weights.weight(e, i, j), gw = g * c.inverse[j];
      part[0] += g, part[1] += gw, part[2] = fmaf(gw, delta, part[2]);
    }
    value += log1pf(q);
    for (int s = 0; s < SUMS; ++s) total[s] += part[s];
  }
  if (values) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) values[((split * D + d) * row_tiles_of(N) + blockIdx.x) * WARPS + threadIdx.x / 32] = value;
  }
  if (!sums || i >= N) return;
  for (int s = 0; s < SUMS; ++s) {
    float* const out = sums + ((split * SUMS + s) * D + d) * N + i;
    *out = add ? *out + total[s] : total[s];
  }
}

// One warp for each second posterior and dimension: sums [SUMS][D][N] of those from `first` to `last`.
template <class Weights>
__global__ void __launch_bounds__(THREADS) second_role(Columns columns, Weights weights, int64_t N, int64_t D, int64_t first,
                                                       int64_t last, float* sums) {
  const int64_t j = first + static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32, d = blockIdx.y;
  const Column c(columns, N, d);
  float total[SUMS] = {};
  for (int64_t i0 = threadIdx.x % 32; i0 < N && j < last; i0 += 32 * ROUND) {
    float part[SUMS] = {};
    const int64_t stop = i0 + 32 * ROUND < N ? i0 + 32 * ROUND : N;
#pragma unroll 4
    for (int64_t i = i0; i < stop; i += 32) {
      const float delta = c.mu[i] - c.mu[j], p = fmaf(delta, delta, c.var[i]);
      const float g = weights.weight(Weights::term(c, i, j, p), i, j);
      part[0] += g, part[1] = fmaf(g, delta, part[1]), part[2] = fmaf(g, p, part[2]);
    }
    for (int s = 0; s < SUMS; ++s) total[s] += part[s];
  }
  for (int s = 0; s < SUMS; ++s) {
    total[s] = warp_sum(total[s]);
    if (threadIdx.x % 32 == 0 && j < last) sums[(s * D + d) * N + j] = total[s];
  }
}

// The gradients [2][N][D] from the sums in both roles, the first [splits][SUMS][D][N].
__global__ void combine(Columns c, const float* a, int64_t splits, const float* b, const float* scale, int64_t N, int64_t D,
                        float* unit) {
  const int64_t at = thread_number(), size = N * D;
  if (at >= size) return;
  const int64_t n = at / D, column = at % D * N + n;
  float first[SUMS] = {};
  for (int64_t split = 0; split < splits; ++split)
    for (int s = 0; s < SUMS; ++s) first[s] += a[(split * SUMS + s) * size + column];
  const float w = c.inverse[column];
  unit[at] = *scale * (first[2] - w * b[size + column]);
  unit[size + at] = *scale * 0.5f * ((c.var[column] * first[1] - first[0]) + (b[column] - w * b[2 * size + column]));
}

// The sum of `count` numbers, by one warp; every warp of the block does the same.
__device__ inline double sum_all(const float* values, int64_t count) {
  double sum = 0;
  for (int64_t k = threadIdx.x % 32; k < count; k += 32) sum += values[k];
  return warp_sum(sum);
}

__global__ void finish_diversity(const float* values, int64_t count, double pairs, float* value, float* scale) {
  const double sum = sum_all(values, count);
  if (threadIdx.x == 0) *value = static_cast<float>(sum / pairs), *scale = static_cast<float>(-1 / pairs);
}

__global__ void finish_mean(const float* mean, int64_t D, float* total) {
  const double sum = sum_all(mean, D);
  if (threadIdx.x == 0) *total = static_cast<float>(sum);
}

__global__ void finish_std(const float* sums, const float* squares, int64_t count, double pairs, float* deviation,
                           float* scale) {
  const double sum = sum_all(sums, count), square = sum_all(squares, count) - sum * sum / pairs;
  const double value = sqrt((square > 0 || square != square ? square : 0) / (pairs - 1));
  if (threadIdx.x != 0) return;
  *deviation = static_cast<float>(value);
  *scale = value == 0 ? 0.f : static_cast<float>(1 / (value * (pairs - 1)));
}

// One warp a dimension: the mean over pairs, and the moments that its gradient needs.
__global__ void means(Columns columns, int64_t N, int64_t D, float* mean, float* moments) {
  const int64_t d = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  const Column c(columns, N, d < D ? d : 0);
  const int lane = threadIdx.x % 32;
  double sum = 0;
  for (int64_t i = lane; i < N; i += 32) sum += c.mu[i];
  const float centre = static_cast<float>(warp_sum(sum) / N);
  double m_sum = 0, w_sum = 0, mw_sum = 0, v_m2 = 0, m2w = 0;
  for (int64_t i = lane; i < N; i += 32) {
    const double m = c.mu[i] - centre, v = c.var[i], w = c.inverse[i];
    m_sum += m, w_sum += w, mw_sum += m * w, v_m2 += v + m * m, m2w += m * m * w;
  }
  m_sum = warp_sum(m_sum), w_sum = warp_sum(w_sum), mw_sum = warp_sum(mw_sum), v_m2 = warp_sum(v_m2), m2w = warp_sum(m2w);
  if (lane != 0 || d >= D) return;
  const double n = static_cast<double>(N);
  mean[d] = static_cast<float>(0.5 * (v_m2 * w_sum - 2 * m_sum * mw_sum + n * m2w - n * n) / (n * (n - 1)));
  const double all[MOMENTS] = {centre, m_sum, w_sum, mw_sum, v_m2};
  for (int k = 0; k < MOMENTS; ++k) moments[k * D + d] = static_cast<float>(all[k]);
}

// Blocks: tiles of first posteriors × fours of the second ones from `first` to `last`. KL − mean [j − first][N], 0 on the
// diagonal; its sum and the sum of its squares a warp.
__global__ void __launch_bounds__(THREADS) deviations(Columns columns, const float* mean, int64_t N, int64_t D, int64_t first,
                                                      int64_t last, float* out, float* sums, float* squares) {
  const int64_t i = thread_number(), j0 = first + static_cast<int64_t>(blockIdx.y) * TILE;
  float kl[TILE] = {}, sum = 0.f, square = 0.f;
  for (int64_t d0 = 0; d0 < D && i < N; d0 += ROUND) {
    float part[TILE] = {};
    for (int64_t d = d0; d < (d0 + ROUND < D ? d0 + ROUND : D); ++d) {
      const Column c(columns, N, d);
      const float mu = c.mu[i], var = c.var[i], log_var = c.log_var[i];
#pragma unroll
      for (int t = 0; t < TILE; ++t) {
        const int64_t j = j0 + t < last ? j0 + t : j0;
        const float delta = mu - c.mu[j];
        part[t] += fmaf(fmaf(delta, delta, var), c.inverse[j], -1.f) + (c.log_var[j] - log_var);
      }
    }
    for (int t = 0; t < TILE; ++t) kl[t] += part[t];
  }
  for (int t = 0; t < TILE; ++t) {
    if (i >= N || j0 + t >= last) continue;
    const float value = i == j0 + t ? 0.f : 0.5f * kl[t] - *mean;
    out[(j0 + t - first) * N + i] = value;
    sum += value, square = fmaf(value, value, square);
  }
  sum = warp_sum(sum), square = warp_sum(square);
  const int64_t warp = (blockIdx.y * row_tiles_of(N) + blockIdx.x) * WARPS + threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) sums[warp] = sum, squares[warp] = square;
}

struct Incoming {
  const float *mean, *deviation, *unit;  // [D]; [] and [2][N][D], or null
  int64_t mean_stride;
};

__global__ void backward_elements(Batch b, const float* moments, Incoming in, float* by_mu, float* by_log_var) {
  const int64_t at = thread_number();
  if (at >= b.N * b.D) return;
  const int64_t n = at / b.D, d = at % b.D;
  const float *const of = moments + d, N = static_cast<float>(b.N);
  const float log_var = b.log_var[n * b.log_var_strides[0] + d * b.log_var_strides[1]], v = expf(log_var), w = expf(-log_var);
  const float m = b.mu[n * b.mu_strides[0] + d * b.mu_strides[1]] - of[0];
  const float sum_m = of[b.D], sum_w = of[2 * b.D], sum_mw = of[3 * b.D], sum_v_m2 = of[4 * b.D];
  const float g = in.mean[d * in.mean_stride] / (N * (N - 1.f));
  by_mu[at] = g * ((m * sum_w - sum_mw) + (N * m - sum_m) * w);
  by_log_var[at] = 0.5f * g * (v * sum_w - w * (sum_v_m2 + m * (N * m - 2.f * sum_m)));
  if (!in.deviation) return;
  by_mu[at] += *in.deviation * in.unit[at];
  by_log_var[at] += *in.deviation * in.unit[b.N * b.D + at];
}

template <class Workspace>
Columns columns_of(const Batch& b, Workspace& workspace, cudaStream_t stream) {
  const int64_t size = b.N * b.D;
  const Columns c{workspace(size), workspace(size), workspace(size), workspace(size)};
  if (size) launch(prepare, grid(tiles_of(size, THREADS)), 0, stream, b, c);
  return c;
}

// value [], and unit [2][N][D] unless null.
template <class Workspace>
void diversity(const Batch& b, float* value, float* unit, Workspace& workspace, cudaStream_t stream) {
  const int64_t N = b.N, D = b.D, row_tiles = row_tiles_of(N);
  const Columns c = columns_of(b, workspace, stream);
  const Split split(tiles_of(N, ROUND), row_tiles * D);
  const int64_t count = D * split.count * row_tiles * WARPS;
  float *const values = workspace(count), *const scale = workspace(1);
  float* const a = unit ? workspace(split.count * SUMS * N * D) : nullptr;
  float* const sums = unit ? workspace(SUMS * N * D) : nullptr;
  if (D)
    launch(first_role<Softplus>, grid(row_tiles, D, split.count), 0, stream, c, Softplus{}, N, D, int64_t(0), N,
           split.tiles_each * ROUND, false, a, values);
  launch(finish_diversity, grid(1), 0, stream, values, count, static_cast<double>(N) * (N - 1), value, scale);
  if (!unit || !D) return;
  launch(second_role<Softplus>, grid(tiles_of(N, WARPS), D), 0, stream, c, Softplus{}, N, D, int64_t(0), N, sums);
  launch(combine, grid(tiles_of(N * D, THREADS)), 0, stream, c, a, split.count, sums, scale, N, D, unit);
}

// mean [D], moments [MOMENTS][D]; deviation [] and unit [2][N][D] unless null. The pair matrix is taken in chunks of second
// posteriors that are of the size of the inputs.
template <class Workspace>
void statistics(const Batch& b, float* mean, float* moments, float* deviation, float* unit, Workspace& workspace,
                cudaStream_t stream) {
  const int64_t N = b.N, D = b.D, row_tiles = row_tiles_of(N);
  const Columns c = columns_of(b, workspace, stream);
  if (D) launch(means, grid(tiles_of(D, WARPS)), 0, stream, c, N, D, mean, moments);
  if (!deviation) return;
  const int64_t wanted = 4 * D + 256, chunk = tiles_of(wanted < N ? wanted : N, TILE) * TILE;
  const int64_t warps = row_tiles * WARPS * (chunk / TILE), count = tiles_of(N, chunk) * warps;
  float *const total = workspace(1), *const scale = workspace(1), *const weights = workspace(chunk * N);
  float *const sums = workspace(count), *const squares = workspace(count);
  float *const a = unit ? workspace(SUMS * N * D) : nullptr, *const b_sums = unit ? workspace(SUMS * N * D) : nullptr;
  launch(finish_mean, grid(1), 0, stream, mean, D, total);
  int64_t done = 0;
  for (int64_t first = 0; first < N; first += chunk) {
    const int64_t last = first + chunk < N ? first + chunk : N, tiles = tiles_of(last - first, TILE);
    launch(deviations, grid(row_tiles, tiles), 0, stream, c, total, N, D, first, last, weights, sums + done, squares + done);
    done += row_tiles * WARPS * tiles;
    if (!unit || !D) continue;
    const Given given{weights, first, N};
    launch(first_role<Given>, grid(row_tiles, D), 0, stream, c, given, N, D, first, last, last - first, first > 0, a,
           static_cast<float*>(nullptr));
    launch(second_role<Given>, grid(tiles_of(last - first, WARPS), D), 0, stream, c, given, N, D, first, last, b_sums);
  }
  launch(finish_std, grid(1), 0, stream, sums, squares, done, static_cast<double>(N) * (N - 1), deviation, scale);
  if (unit && D) launch(combine, grid(tiles_of(N * D, THREADS)), 0, stream, c, a, int64_t(1), b_sums, scale, N, D, unit);
}

inline void backward(const Batch& b, const float* moments, const Incoming& in, float* by_mu, float* by_log_var,
                     cudaStream_t stream) {
  if (b.N * b.D) launch(backward_elements, grid(tiles_of(b.N * b.D, THREADS)), 0, stream, b, moments, in, by_mu, by_log_var);
}

}  // namespace latent_engine::pairwise_kl
