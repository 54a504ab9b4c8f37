// Kernels of mmd2_to_normal and their launch; notation and formulas are in kernels/mmd_normal.py. Lengths are in units of the
// power of two nearest to √D σ, so that scaling rounds nothing.
//
// A block owns one row: no atomics, and one order of every sum. `cross` takes the row against the prior and starts its
// gradients; `pairs` goes over all others, a thread a row, in tiles of 128. For posteriors Σ δ²/t and Π t, t = 1 + 2a s ≥ 1, are
// one fraction, num/den ← (num t + 2a δ² den) / (den t): no division in the loop over dimensions.
#pragma once

#include <cmath>
#include <cstdint>

#include "launch.cuh"

namespace latent_engine::mmd_normal {

constexpr int CHUNK = 32;       // dimensions in shared memory at a time
constexpr int LD = CHUNK + 1;   // leading dimension of the tile: no bank conflicts
constexpr int NODES = 8;        // nodes of a pass over the dimensions
constexpr int WARPS = THREADS / 32;
constexpr float LARGEST_VARIANCE = 1e27f;  // as good as infinite: the expectation is below 1e-12
// den < FULL before a factor, and the factor 1 + 2a s < 2^117, as s < 2^91 and scales are over 1e-6: no product overflows.
constexpr float FULL = 0x1p10f;
constexpr int SHARED_FLOATS = 2 * THREADS * LD + NODES * THREADS;

struct Problem {
  const void* x;  // [N, D]
  Scalar x_type;
  int64_t x_row, x_col;
  const float* log_var;  // [N, D] or null: points
  int64_t log_var_row, log_var_col;
  int64_t N, D;
  const float *rates, *weights;  // [nodes]
  int nodes;
  const float* widths;  // [count] of inverse multiquadrics between points, or count 0
  int count;
  float unit, prior_variance, pair_weight, cross_weight;  // pair_weight is that of an ordered pair
  bool biased;

  __device__ float mean(int64_t n, int64_t d) const { return load(x, x_type, n * x_row + d * x_col) * unit; }
  __device__ float variance(int64_t n, int64_t d) const {
    if (!log_var) return 0.f;
    const float v = expf(log_var[n * log_var_row + d * log_var_col]) * unit * unit;
    return v > LARGEST_VARIANCE ? LARGEST_VARIANCE : v;
  }
};

struct Outputs {
  float* values;         // [N]
  float *dx, *dlog_var;  // [N, D] or null: both or none of them for posteriors
};

struct Fraction {
  float num = 0.f, den = 1.f;
  int exponent = 0;

  __device__ void add(float square, float variance, float twice_rate) {
    const float t = fmaf(twice_rate, variance, 1.f);
    num = fmaf(num, t, twice_rate * square * den);
    den *= t;
    if (den >= FULL) {
      int bits;
      den = frexpf(den, &bits), num = ldexpf(num, -bits), exponent += bits;
    }
  }
  __device__ float expectation() const {
    return expf(-0.5f * (num / den + (logf(den) + exponent * 0.69314718f)));
  }
};

// Sum over the block, in every thread.
__device__ inline float block_sum(float value, float* memory) {
  for (int w = 1; w < 32; w *= 2) value += from_lane_xor(value, w);
  __syncthreads();
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < WARPS; ++w) sum += memory[w];
  return sum;
}

// The row of the block against the prior; threads share the dimensions.
__global__ void __launch_bounds__(THREADS) cross(Problem p, Outputs out) {
  float* memory = shared_memory();
  const int64_t i = blockIdx.x;
  float total = 0.f;
  for (int64_t d = threadIdx.x; out.dx && d < p.D; d += THREADS) {
    out.dx[i * p.D + d] = 0.f;
    if (out.dlog_var) out.dlog_var[i * p.D + d] = 0.f;
  }
  for (int q = 0; q < p.nodes; ++q) {
    const float twice = 2 * p.rates[q];
    float exponent = 0.f;
    for (int64_t d = threadIdx.x; d < p.D; d += THREADS) {
      const float mean = p.mean(i, d), t = fmaf(twice, p.variance(i, d) + p.prior_variance, 1.f);
      exponent += twice * mean * mean / t + logf(t);
    }
    const float e = p.weights[q] * expf(-0.5f * block_sum(exponent, memory));
    total += e;
    for (int64_t d = threadIdx.x; out.dx && d < p.D; d += THREADS) {
      const float mean = p.mean(i, d), v = p.variance(i, d), r = twice / fmaf(twice, v + p.prior_variance, 1.f);
      out.dx[i * p.D + d] -= p.cross_weight * p.unit * e * r * mean;
      if (out.dlog_var) out.dlog_var[i * p.D + d] += 0.5f * p.cross_weight * v * e * (r * r * mean * mean - r);
    }
  }
  if (threadIdx.x == 0) out.values[i] = p.cross_weight * total;
}

// Dimensions [d0, d0 + dims) of rows [j0, j0 + THREADS); zeros past the last row.
__device__ inline void load_tile(const Problem& p, int64_t j0, int64_t d0, int dims, float* means, float* variances) {
  __syncthreads();
  for (int k = threadIdx.x; k < THREADS * CHUNK; k += THREADS) {
    const int d = k % CHUNK, j = k / CHUNK;
    if (d >= dims) continue;
    const bool inside = j0 + j < p.N;
    means[j * LD + d] = inside ? p.mean(j0 + j, d0 + d) : 0.f;
    if (p.log_var) variances[j * LD + d] = inside ? p.variance(j0 + j, d0 + d) : 0.f;
  }
  __syncthreads();
}

// The row of the block against all others. SMOOTH: expectations of Gaussian kernels; otherwise inverse multiquadrics.
template <bool SMOOTH>
__global__ void __launch_bounds__(THREADS) pairs(Problem p, Outputs out) {
  float *means = shared_memory(), *variances = means + THREADS * LD, *terms = variances + THREADS * LD;
  const int64_t i = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, passes = SMOOTH ? (p.nodes + NODES - 1) / NODES : 1;
  float total = 0.f;
  for (int64_t j0 = 0; j0 < p.N; j0 += THREADS) {
    const int64_t j = j0 + threadIdx.x;
    const bool counts = j < p.N && (p.biased || j != i);
    for (int pass = 0; pass < passes; ++pass) {
      const int q0 = pass * NODES;
      Fraction fractions[NODES];
      float square = 0.f, twice[NODES];
#pragma unroll
      for (int k = 0; k < NODES; ++k) twice[k] = SMOOTH && q0 + k < p.nodes ? 2 * p.rates[q0 + k] : 0.f;
      for (int64_t d0 = 0; d0 < p.D; d0 += CHUNK) {
        const int dims = static_cast<int>(p.D - d0 < CHUNK ? p.D - d0 : CHUNK);
        load_tile(p, j0, d0, dims, means, variances);
        for (int d = 0; d < dims; ++d) {
          const float delta = means[threadIdx.x * LD + d] - p.mean(i, d0 + d);
          if (!SMOOTH) {
            square = fmaf(delta, delta, square);
            continue;
          }
          const float s = p.log_var ? variances[threadIdx.x * LD + d] + p.variance(i, d0 + d) : 0.f;
#pragma unroll
          for (int k = 0; k < NODES; ++k) fractions[k].add(delta * delta, s, twice[k]);
        }
      }
      // terms[k][j]: e of a node, or twice the negative derivative of the kernel in r²
      if (SMOOTH) {
#pragma unroll
        for (int k = 0; k < NODES; ++k) {
          const float e = counts && q0 + k < p.nodes ? p.weights[q0 + k] * fractions[k].expectation() : 0.f;
          terms[k * THREADS + threadIdx.x] = e;
          total += e;
        }
      } else {
        float slope = 0.f;
        for (int s = 0; s < p.count; ++s) {
          const float term = p.widths[s] / (p.widths[s] + square);
          total += counts ? term : 0.f;
          slope += 2 * term * (term / p.widths[s]);
        }
        terms[threadIdx.x] = counts ? slope : 0.f;
      }
      if (!out.dx) continue;
      for (int64_t d0 = 0; d0 < p.D; d0 += CHUNK) {
        const int dims = static_cast<int>(p.D - d0 < CHUNK ? p.D - d0 : CHUNK);
        load_tile(p, j0, d0, dims, means, variances);
        float slope = 0.f, spread = 0.f;  // of dimension `lane`, over every fourth row
        if (lane < dims) {
          const float mean = p.mean(i, d0 + lane), v = p.variance(i, d0 + lane);
          for (int other = warp; other < THREADS; other += WARPS) {
            const float delta = mean - means[other * LD + lane];
            const float s = p.log_var ? v + variances[other * LD + lane] : 0.f;
            float first = SMOOTH ? 0.f : terms[other], second = 0.f;
            for (int k = 0; SMOOTH && k < NODES; ++k) {
              const float r = twice[k] / fmaf(twice[k], s, 1.f), part = terms[k * THREADS + other] * r;
              first += part, second = fmaf(part, r, second);
            }
            slope = fmaf(-first, delta, slope);
            spread += second * delta * delta - first;
          }
        }
        __syncthreads();  // the tile is read; its memory takes the sums of the warps
        means[warp * LD + lane] = slope, variances[warp * LD + lane] = spread;
        __syncthreads();
        if (warp == 0 && lane < dims) {
          for (int w = 1; w < WARPS; ++w) slope += means[w * LD + lane], spread += variances[w * LD + lane];
          out.dx[i * p.D + d0 + lane] += 2 * p.pair_weight * p.unit * slope;
          if (out.dlog_var)
            out.dlog_var[i * p.D + d0 + lane] += p.pair_weight * p.variance(i, d0 + lane) * spread;
        }
      }
    }
  }
  total = block_sum(total, terms);
  if (threadIdx.x == 0) out.values[i] += p.pair_weight * total;
}

// The value: the shares of the rows and the constant. One block.
__global__ void merge(const float* values, int64_t N, double constant, float* value) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x % 32; i < N; i += 32) sum += values[i];
  for (int w = 1; w < 32; w *= 2) sum += from_lane_xor(sum, w);
  if (threadIdx.x == 0) *value = static_cast<float>(sum + constant);
}

inline void forward(const Problem& p, const Outputs& out, double constant, float* value, cudaStream_t stream) {
  launch(cross, grid(p.N), WARPS, stream, p, out);
  launch(p.count ? pairs<false> : pairs<true>, grid(p.N), SHARED_FLOATS, stream, p, out);
  launch(merge, grid(1), 0, stream, out.values, p.N, constant, value);
}

}  // namespace latent_engine::mmd_normal
