// Kernels of MMD sums and their gradients; notation and formulas are in kernels/mmd.py.
#pragma once

#include "../mmd.h"

namespace latent_engine::mmd {

constexpr int TILE = 64, CHUNK = 16, LD = TILE + 4;  // points of a tile's side, dimensions held at a time, row of shared memory
constexpr int ROWS = 8, COLUMNS = 4;                 // pairs of a thread
constexpr int SHARED_FLOATS = 2 * CHUNK * LD + TILE * LD;
constexpr int MAX_SCALES = 64;

struct Profile {
  MmdKernel kernel;
  int count;
  float unit, scales[MAX_SCALES];
};

struct Points {
  const float* data;
  int64_t count, row, col;
};

// k(u) and −dk/du; the slope at a cusp is 0.
__device__ inline float2 evaluate(const Profile& p, float u) {
  float value = 0.f, slope = 0.f;
  const bool cusp = p.kernel == MmdKernel::laplacian || p.kernel == MmdKernel::energy;
  const float r = cusp ? sqrtf(u) : 0.f, half = u == 0.f ? 0.f : 0.5f / r;
  if (p.kernel == MmdKernel::energy) return {-r, half};
  for (int s = 0; s < p.count; ++s) {
    const float width = p.unit * p.scales[s];
    float k, rate;
    if (p.kernel == MmdKernel::gaussian) {
      rate = 1.f / width, k = expf(-u * rate);
    } else if (p.kernel == MmdKernel::imq) {
      rate = 1.f / (width + u), k = width * rate;
    } else if (p.kernel == MmdKernel::laplacian) {
      rate = 1.f / sqrtf(width), k = expf(-r * rate), rate *= half;
    } else {
      const float base = 1.f + u / width;
      rate = 1.f / (p.unit * base), k = expf(-p.scales[s] * logf(base));
    }
    value += k, slope += k * rate;
  }
  return {value, slope};
}

// Dimensions [d0, d0 + CHUNK) of a tile of points as out[CHUNK][LD], zeros outside.
__device__ inline void load_chunk(const Points& points, int64_t first, int64_t d0, int64_t D, float* out) {
  for (int i = threadIdx.x; i < CHUNK * TILE; i += THREADS) {
    const int64_t n = first + i / CHUNK, d = d0 + i % CHUNK;
    out[i % CHUNK * LD + i / CHUNK] = n < points.count && d < D ? points.data[n * points.row + d * points.col] : 0.f;
  }
}

// Squared distances of a thread's pairs: rows threadIdx / 16 · 8 + i, columns threadIdx % 16 + 16 j.
__device__ inline void distances(const Points& rows, const Points& others, int64_t n0, int64_t m0, int64_t D, float* x,
                                 float* y, float (&u)[ROWS][COLUMNS]) {
  const int row = threadIdx.x / 16 * ROWS, column = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) u[i][j] = 0.f;
  for (int64_t d0 = 0; d0 < D; d0 += CHUNK) {
    __syncthreads();
    load_chunk(rows, n0, d0, D, x);
    load_chunk(others, m0, d0, D, y);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < CHUNK; ++d) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const float other = y[d * LD + column + 16 * j];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          const float delta = x[d * LD + row + i] - other;
          u[i][j] += delta * delta;
        }
      }
    }
  }
}

// grad[n, d] += factor Σ_m slopes[m][n] (x_nd − y_md) for a tile; every number belongs to one thread.
__device__ inline void pull(const Points& rows, const Points& others, int64_t n0, int64_t m0, int64_t D, const float* slopes,
                            float factor, bool first, float* x, float* y, float* grad) {
  const int row = threadIdx.x % TILE;
  for (int64_t d0 = 0; d0 < D; d0 += CHUNK) {
    __syncthreads();
    load_chunk(rows, n0, d0, D, x);
    load_chunk(others, m0, d0, D, y);
    __syncthreads();
    for (int d = threadIdx.x / TILE; d < CHUNK; d += THREADS / TILE) {
      const float point = x[d * LD + row];
      float sum = 0.f;
#pragma unroll 8
      for (int m = 0; m < TILE; ++m) sum += slopes[m * LD + row] * (point - y[d * LD + m]);
      if (n0 + row < rows.count && d0 + d < D) {
        float* const at = grad + (n0 + row) * D + d0 + d;
        *at = first ? factor * sum : *at + factor * sum;
      }
    }
  }
}

// Blocks: row tiles × splits of the others. sums[split][row tile] = weight Σ k over pairs; without gradients a pair of one
// sample is taken once and counts twice. grads[split][N, D] = factor Σ slope δ, or null.
__global__ void __launch_bounds__(THREADS) pairs(Profile profile, Points rows, Points others, int64_t D, bool same,
                                                 int64_t tiles_each, double weight, float factor, double* sums, float* grads) {
  float *const x = shared_memory(), *const y = x + CHUNK * LD, *const slopes = y + CHUNK * LD;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * TILE, begin = blockIdx.y * tiles_each * TILE;
  const int64_t end = begin + tiles_each * TILE < others.count ? begin + tiles_each * TILE : others.count;
  const bool once = same && !grads;
  const int row = threadIdx.x / 16 * ROWS, column = threadIdx.x % 16;
  double total = 0.0;
  for (int64_t m0 = once && n0 > begin ? n0 : begin; m0 < end; m0 += TILE) {
    float u[ROWS][COLUMNS], sum = 0.f;
    distances(rows, others, n0, m0, D, x, y, u);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int64_t n = n0 + row + i, m = m0 + column + 16 * j;
        const bool counts = n < rows.count && m < others.count && !(same && (once ? n >= m : n == m));
        const float2 k = evaluate(profile, u[i][j]);
        sum += counts ? k.x : 0.f;
        if (grads) slopes[(column + 16 * j) * LD + row + i] = counts ? k.y : 0.f;
      }
    total += sum;
    if (grads)
      pull(rows, others, n0, m0, D, slopes, factor, m0 == begin, x, y, grads + blockIdx.y * rows.count * D);
  }
  for (int w = 1; w < 32; w *= 2) total += from_lane_xor(total, w);
  __syncthreads();
  auto* const warps = reinterpret_cast<double*>(shared_memory());
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    double all = 0.0;
    for (int w = 0; w < THREADS / 32; ++w) all += warps[w];
    sums[blockIdx.y * ((rows.count + TILE - 1) / TILE) + blockIdx.x] = (once ? 2.0 : 1.0) * weight * all;
  }
}

// value = constant + Σ sums, by one block in fixed order.
__global__ void add_sums(const double* sums, int64_t count, double constant, float* value) {
  auto* const parts = reinterpret_cast<double*>(shared_memory());
  double part = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS) part += sums[i];
  parts[threadIdx.x] = part;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int t = 0; t < THREADS; ++t) constant += parts[t];
  *value = static_cast<float>(constant);
}

// grad = Σ parts over the splits, of `size` numbers each.
__global__ void add_grads(const float* parts, int64_t splits, int64_t size, float* grad) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int64_t s = 0; s < splits; ++s) sum += parts[s * size + i];
  grad[i] = sum;
}

// out[n, m] = k(x_n, y_m). Blocks: row tiles × column tiles.
__global__ void __launch_bounds__(THREADS) matrix_tiles(Profile profile, Points x, Points y, int64_t D, float* out) {
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * TILE, m0 = static_cast<int64_t>(blockIdx.y) * TILE;
  float u[ROWS][COLUMNS];
  distances(x, y, n0, m0, D, shared_memory(), shared_memory() + CHUNK * LD, u);
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const int64_t n = n0 + threadIdx.x / 16 * ROWS + i, m = m0 + threadIdx.x % 16 + 16 * j;
      if (n < x.count && m < y.count) out[n * y.count + m] = evaluate(profile, u[i][j]).x;
    }
}

}  // namespace latent_engine::mmd
