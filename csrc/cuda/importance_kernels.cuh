// Kernels of the importance ops; notation and formulas are in kernels/importance.py. Partial sums are left to a merging kernel
// that adds them in fixed order, one for each split and for each row of threads of a block.
#pragma once

#include "launch.cuh"

namespace latent_engine::importance {

constexpr int COLUMNS = 32, LANES = THREADS / COLUMNS;  // of a block that reduces log-weights: data points × samples
constexpr int MOMENTS = 4;                              // largest sign · log w, Σ e, Σ e², Σ log w

struct Samples {
  const void* z;
  Scalar type;
  int64_t stride_s, stride_n, stride_d;
  int64_t S, N, D;
  bool normal_prior;
  const float *mu, *inv_vars;  // [N, D]
  const float* constants;      // [N]: ½ Σ log_var, and ½ D log 2π with a given prior

  __device__ float at(int64_t s, int64_t n, int64_t d) const {
    return load(z, type, s * stride_s + n * stride_n + d * stride_d);
  }
};

// How a bound weighs log w: sign · log w to the power of scale, or only the largest.
struct Order {
  float sign, scale;
  bool extreme;
};

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

template <class T>
__device__ T finite_or_zero(T x) {
  return x - x == T(0) ? x : T(0);
}

template <class T>
__device__ T power(T x, T top, const Order& order) {
  if (order.extreme) return x == top ? T(1) : x == x ? T(0) : x;
  return exponential(static_cast<T>(order.scale) * (x - finite_or_zero(top)));
}

// One warp a data point.
__global__ void prepare(const float* log_var, int64_t stride_n, int64_t stride_d, bool normal_prior, int64_t N, int64_t D,
                        float* inv_vars, float* constants) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  double sum = 0.0;
  if (n < N)
    for (int64_t d = lane; d < D; d += 32) {
      const float value = log_var[n * stride_n + d * stride_d];
      inv_vars[n * D + d] = expf(-value);
      sum += value;
    }
  for (int w = 1; w < 32; w *= 2) sum += from_lane_xor(sum, w);
  if (n < N && lane == 0)
    constants[n] = static_cast<float>(0.5 * (sum + (normal_prior ? 0.0 : static_cast<double>(D) * 1.8378770664093454836)));
}

// WIDTH threads a log-weight, which lie in the order of z in memory.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS) log_weights(Samples p, const float* log_px, const float* log_pz, float* log_w) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS / WIDTH) + threadIdx.x / WIDTH;
  const int64_t s = row / p.N, n = row % p.N;
  const int lane = threadIdx.x % WIDTH;
  float sum = 0.f;
  if (s < p.S)
    for (int64_t d = lane; d < p.D; d += WIDTH) {
      const float x = p.at(s, n, d), delta = x - p.mu[n * p.D + d];
      sum = fmaf(delta * p.inv_vars[n * p.D + d], delta, sum);
      if (p.normal_prior) sum = fmaf(-x, x, sum);
    }
#pragma unroll
  for (int w = 1; w < WIDTH; w *= 2) sum += from_lane_xor(sum, w);
  if (s < p.S && lane == 0) log_w[row] = log_px[row] + (p.constants[n] + 0.5f * sum) + (log_pz ? log_pz[row] : 0.f);
}

// Blocks: groups × splits of the samples × columns; parts [groups, splits · LANES, MOMENTS, N].
template <class T>
__global__ void __launch_bounds__(THREADS) moments(const float* log_w, int64_t size, int64_t N, int64_t splits, int64_t share,
                                                   Order order, T* parts) {
  const int64_t columns = tiles_of(N, COLUMNS), n = blockIdx.x % columns * COLUMNS + threadIdx.x % COLUMNS;
  if (n >= N) return;
  const int64_t split = blockIdx.x / columns % splits, group = blockIdx.x / columns / splits;
  const int64_t begin = split * share + threadIdx.x / COLUMNS;
  const int64_t end = (split + 1) * share < size ? (split + 1) * share : size;
  const float* const x = log_w + group * size * N + n;
  T top = -INFINITY, sum = 0, square = 0, total = 0;
  for (int64_t s = begin; s < end; s += LANES) {
    const T value = x[s * N], signed_value = static_cast<T>(order.sign) * value;
    total += value;
    top = signed_value > top ? signed_value : top;  // a NaN reaches the sums
  }
  for (int64_t s = begin; s < end; s += LANES) {
    const T e = power<T>(static_cast<T>(order.sign) * x[s * N], top, order);
    sum += e;
    square += e * e;
  }
  const int64_t part = (group * splits + split) * LANES + threadIdx.x / COLUMNS;
  T* const out = parts + part * MOMENTS * N + n;
  out[0] = top, out[N] = sum, out[2 * N] = square, out[3 * N] = total;
}

// Moments of one data point from `count` parts [count, MOMENTS, N].
template <class T>
__device__ void merge(const T* parts, int64_t count, int64_t N, const Order& order, T (&out)[MOMENTS]) {
  out[0] = -INFINITY, out[1] = out[2] = out[3] = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T top = parts[i * MOMENTS * N];
    out[0] = top > out[0] ? top : out[0];
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* const part = parts + i * MOMENTS * N;
    const T factor = power<T>(part[0], out[0], order);
    out[1] += part[N] * factor;
    out[2] += part[2 * N] * (factor * factor);
    out[3] += part[3 * N];
  }
}

// Close to the Rényi bound · sign of a group. log(Σ e / size) next to 1 has lost what the division by a small scale shows; the
// mean is closer where all log-weights are.
__device__ inline float centre_of(float rough, float top, float mean, float scale) {
  return scale * (top - mean) < 0x1p-10f ? mean : rough;
}

// bound [N], and for the weights the largest log-weight and the factor of each group and data point, [groups, N]; with
// `centres` [groups, N] the bound is to be corrected by the excess over them.
__global__ void bounds(const float* parts, int64_t count, int64_t groups, int64_t S, int64_t N, Order order, float elbo_weight,
                       float* bound, float* tops, float* factors, float* centres) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= N) return;
  float renyi = 0.f, total = 0.f;
  for (int64_t g = 0; g < groups; ++g) {
    float m[MOMENTS];
    merge(parts + g * count * MOMENTS * N + n, count, N, order, m);
    total += m[3];
    const float inverse_size = static_cast<float>(groups) / S;
    float value = order.extreme ? m[0] + (m[1] - m[1]) : finite_or_zero(m[0]) + logf(m[1] * inverse_size) / order.scale;
    if (centres) centres[g * N + n] = value = centre_of(value, m[0], order.sign * m[3] * inverse_size, order.scale);
    renyi += order.sign * value;
    tops[g * N + n] = m[0];
    factors[g * N + n] = m[1] == 0.f ? 0.f : (1.f - elbo_weight) / (static_cast<float>(groups) * m[1]);
  }
  const float mean = total / S, value = renyi / groups;
  bound[n] = elbo_weight == 0.f ? value : elbo_weight == 1.f ? mean : elbo_weight * mean + (1.f - elbo_weight) * value;
}

// Parts of Σ exp(scale · (sign · log w − centre)) − 1, [groups, splits · LANES, N]; blocks as those of `moments`.
__global__ void __launch_bounds__(THREADS) excesses(const float* log_w, const float* centres, int64_t size, int64_t N,
                                                    int64_t splits, int64_t share, Order order, float* parts) {
  const int64_t columns = tiles_of(N, COLUMNS), n = blockIdx.x % columns * COLUMNS + threadIdx.x % COLUMNS;
  if (n >= N) return;
  const int64_t split = blockIdx.x / columns % splits, group = blockIdx.x / columns / splits;
  const int64_t begin = split * share + threadIdx.x / COLUMNS;
  const int64_t end = (split + 1) * share < size ? (split + 1) * share : size;
  const float centre = centres[group * N + n];
  float sum = 0.f;
  for (int64_t s = begin; s < end; s += LANES)
    sum += expm1f(order.scale * (order.sign * log_w[(group * size + s) * N + n] - centre));
  parts[((group * splits + split) * LANES + threadIdx.x / COLUMNS) * N + n] = sum;
}

// Adds to the bound what the excess makes of it.
__global__ void correct(const float* parts, const float* centres, int64_t count, int64_t groups, int64_t S, int64_t N,
                        Order order, float elbo_weight, float* bound) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= N) return;
  float sum = 0.f;
  for (int64_t g = 0; g < groups; ++g) {
    float excess = 0.f;
    for (int64_t i = 0; i < count; ++i) excess += parts[(g * count + i) * N + n];
    const float centre = centres[g * N + n];
    if (centre - centre == 0.f) sum += log1pf(excess * (static_cast<float>(groups) / S)) / order.scale;
  }
  bound[n] += order.sign * ((1.f - elbo_weight) / groups) * sum;
}

// Moments of the parts and of `state` together, [MOMENTS, N].
__global__ void merge_moments(const double* parts, int64_t count, int64_t N, const double* state, double* out) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= N) return;
  const Order order{1.f, 1.f, false};
  double both[2 * MOMENTS], m[MOMENTS];
  merge(parts + n, count, N, order, m);
  for (int i = 0; i < MOMENTS; ++i) both[i] = state[i * N + n], both[MOMENTS + i] = m[i];
  merge(both, 2, 1, order, m);
  for (int i = 0; i < MOMENTS; ++i) out[i * N + n] = m[i];
}

// ∂bound / ∂log w, [S, N]; `size` samples a group.
__global__ void weights(const float* log_w, const float* tops, const float* factors, int64_t S, int64_t N, int64_t size,
                        Order order, float elbo_weight, float* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= S * N) return;
  const int64_t at = i / N / size * N + i % N;
  const float elbo = elbo_weight / S;
  out[i] = elbo_weight == 1.f ? elbo : power(order.sign * log_w[i], tops[at], order) * factors[at] + elbo;
}

// Parts of the sums over samples: [parts, N, D], [parts, N, D], [parts, N].
struct Sums {
  float *first, *second, *weight;
};

struct Upstream {
  const float *weights, *grad;  // [S, N]; [N] or null
  float* grad_log_w;            // [S, N] where there is a grad
};

// Blocks: data points × splits of the samples × chunks of WIDTH dimensions, one a thread; the rows of a block take one sample
// each. Null outputs are not needed.
template <int WIDTH>
__global__ void __launch_bounds__(THREADS) backward(Samples p, Upstream up, int64_t share, void* grad_z, Sums out) {
  constexpr int ROWS = THREADS / WIDTH;
  const int64_t n = blockIdx.x, d = static_cast<int64_t>(blockIdx.z) * WIDTH + threadIdx.x % WIDTH;
  const int64_t begin = blockIdx.y * share + threadIdx.x / WIDTH;
  const int64_t end = (blockIdx.y + 1) * share < p.S ? (blockIdx.y + 1) * share : p.S;
  const float mu = d < p.D ? p.mu[n * p.D + d] : 0.f, inv_var = d < p.D ? p.inv_vars[n * p.D + d] : 0.f;
  float first = 0.f, second = 0.f, weight = 0.f;
#pragma unroll 4
  for (int64_t s = begin; s < end; s += ROWS) {
    const int64_t row = s * p.N + n;
    const float coef = up.grad ? up.weights[row] * up.grad[n] : up.weights[row];
    if (d == 0 && up.grad) up.grad_log_w[row] = coef;
    weight += coef;
    if (d >= p.D) continue;
    const float x = p.at(s, n, d), delta = x - mu, scaled = delta * inv_var, weighted = coef * scaled;
    if (grad_z) store(grad_z, p.type, row * p.D + d, coef * (p.normal_prior ? scaled - x : scaled));
    first += weighted;
    second = fmaf(weighted, delta, second);
  }
  if (!out.first) return;
  const int64_t part = (blockIdx.y * ROWS + threadIdx.x / WIDTH) * p.N + n;
  if (d == 0) out.weight[part] = weight;
  if (d < p.D) out.first[part * p.D + d] = first, out.second[part * p.D + d] = second;
}

__global__ void merge_sums(Sums parts, int64_t count, int64_t N, int64_t D, float* grad_mu, float* grad_log_var) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= N * D) return;
  float first = 0.f, second = 0.f, weight = 0.f;
#pragma unroll 4
  for (int64_t k = 0; k < count; ++k) {
    first += parts.first[k * N * D + i];
    second += parts.second[k * N * D + i];
    weight += parts.weight[k * N + i / D];
  }
  grad_mu[i] = -first;
  grad_log_var[i] = 0.5f * (weight - second);
}

}  // namespace latent_engine::importance
