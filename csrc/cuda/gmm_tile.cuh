// Tiles of rows × components of a Gaussian mixture: their logits, and the weights of the gradients. Notation and
// formulas are in kernels/gmm.py.
//
// A block works through tiles, each thread on a few rows times four components in registers, with D in chunks that fit
// shared memory. δ = z − μ is formed before it is scaled. At μ near 10, σ² = e^-30 and z within a few σ, that is off by
// 2e-7 nats; the pre-scaled form z/σ − μ/σ, which saves one operation of three, by 8, and the expanded form, which
// tensor cores need, by 3e8. So a pair costs 3·D operations forward and 6·D or 7·D in a backward pass.
//
// A component that is not allowed, or a row without any, has weight 0 whatever its numbers are. The gradient passes
// replace non-finite numbers by 0 after the weights are known: where they matter the weight is NaN already.
#pragma once

#include "gmm_rows.cuh"

namespace latent_engine::gmm {

struct Problem {
  const void* z;  // [N, D]
  Scalar z_type;
  int64_t z_row, z_col;  // strides of z
  const float* means;     // [K, D]
  const float* inv_vars;  // [K, D], 1/σ²
  const float* constants;  // [K], log_weights − ½ Σ_d (log σ² + log 2π)
  const int64_t* labels;   // [N] or null
  const bool* allowed;     // [N or C, K] or null
  int64_t N, K, D;

  __device__ bool is_allowed(int64_t n, int64_t k) const {
    if (n >= N || k >= K) return false;
    if (!labels && !allowed) return true;
    const int64_t set = labels ? labels[n] : n;
    return set < 0 || (allowed ? allowed[set * K + k] : set == k);
  }
};

// Shapes of a tile: ROWS × COMPONENTS, over CHUNK dimensions at a time.
template <int ROWS, int COMPONENTS, int CHUNK>
struct Tile {
  static constexpr int N = ROWS, K = COMPONENTS, C = CHUNK;
  static constexpr int LDN = N + 4, LDK = K + 4;  // leading dimensions: aligned to 16 bytes, fewer bank conflicts
  static constexpr int TK = 4, GROUPS = K / TK, TN = N * GROUPS / THREADS;  // a thread has TN rows and TK components
  static constexpr int FORWARD_FLOATS = C * (LDN + 2 * LDK);
  static constexpr int ROWS_FLOATS = FORWARD_FLOATS + K * LDN;
  static constexpr int COMPONENTS_FLOATS = FORWARD_FLOATS + N * LDK;

  static_assert(THREADS % GROUPS == 0 && GROUPS <= 32 && TN % 4 == 0);

  float* z = shared_memory();     // [C][LDN]
  float* means = z + C * LDN;     // [C][LDK]
  float* inv_vars = means + C * LDK;  // [C][LDK]
  float* weights = inv_vars + C * LDK;  // [K][LDN] in the pass over rows, [N][LDK] in the pass over components

  __device__ static int first_row() { return threadIdx.x / GROUPS * TN; }
  __device__ static int first_component() { return threadIdx.x % GROUPS * TK; }
  __host__ __device__ static int64_t chunks(int64_t D) { return D > C ? (D + C - 1) / C : 1; }
  __device__ static int dims(int64_t D, int64_t chunk) { return D - chunk * C < C ? int(D - chunk * C) : C; }

  __device__ void load_z(const Problem& p, int64_t n0, int64_t chunk) const {
    const int count = dims(p.D, chunk);
    for (int i = threadIdx.x; i < N * C; i += THREADS) {
      const int d = i % C, n = i / C;
      if (d < count)
        z[d * LDN + n] = n0 + n < p.N ? load(p.z, p.z_type, (n0 + n) * p.z_row + (chunk * C + d) * p.z_col) : 0.f;
    }
  }

  __device__ void load_components(const Problem& p, int64_t k0, int64_t chunk) const {
    const int count = dims(p.D, chunk);
    for (int i = threadIdx.x; i < K * C; i += THREADS) {
      const int d = i % C, k = i / C;
      if (d >= count) continue;
      const int64_t at = (k0 + k) * p.D + chunk * C + d;
      means[d * LDK + k] = k0 + k < p.K ? p.means[at] : 0.f;
      inv_vars[d * LDK + k] = k0 + k < p.K ? p.inv_vars[at] : 0.f;
    }
  }
};

enum class Fresh { both, z, components };  // which operands a tile does not share with the block's tile before it

__device__ inline float finite_or_zero(float x) { return fabsf(x) <= FLT_MAX ? x : 0.f; }

template <int COUNT>
__device__ void load_vector(const float* from, float (&to)[COUNT]) {
  static_assert(COUNT % 4 == 0 || COUNT < 4);
  if constexpr (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + i);
      to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = from[i];
  }
}

template <class T>
__device__ void load_chunk(const T& tile, const Problem& p, int64_t n0, int64_t k0, int64_t chunk, Fresh fresh) {
  const bool all = fresh == Fresh::both || T::chunks(p.D) > 1;
  __syncthreads();
  if (all || fresh == Fresh::z) tile.load_z(p, n0, chunk);
  if (all || fresh == Fresh::components) tile.load_components(p, k0, chunk);
  __syncthreads();
}

// distances += Σ_d δ² / σ² over the dimensions in shared memory, summed by sixteens: over D = 512 a plain running sum
// would exceed the error budget.
template <class T>
__device__ void add_distances(const T& tile, int dims, float (&distances)[T::TN][T::TK]) {
  for (int d0 = 0; d0 < dims; d0 += 16) {
    float part[T::TN][T::TK] = {};
    const int end = d0 + 16 < dims ? d0 + 16 : dims;
#pragma unroll 2
    for (int d = d0; d < end; ++d) {
      float z[T::TN], mean[T::TK], inv_var[T::TK];
      load_vector(tile.z + d * T::LDN + T::first_row(), z);
      load_vector(tile.means + d * T::LDK + T::first_component(), mean);
      load_vector(tile.inv_vars + d * T::LDK + T::first_component(), inv_var);
#pragma unroll
      for (int i = 0; i < T::TN; ++i)
#pragma unroll
        for (int j = 0; j < T::TK; ++j) {
          const float delta = z[i] - mean[j];
          part[i][j] = fmaf(delta * delta, inv_var[j], part[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < T::TN; ++i)
#pragma unroll
      for (int j = 0; j < T::TK; ++j) distances[i][j] += part[i][j];
  }
}

// The logits of a tile, −inf where a component is not allowed. Leaves the chunk `own` in shared memory. Every kernel
// sums in the same order: a dominant component then has l = log p to the bit, and weight 1.
template <class T>
__device__ void tile_logits(const T& tile, const Problem& p, int64_t n0, int64_t k0, int64_t own, Fresh fresh,
                            float (&logits)[T::TN][T::TK]) {
  float distances[T::TN][T::TK] = {};
  const int64_t chunks = T::chunks(p.D);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    load_chunk(tile, p, n0, k0, chunk, fresh);
    add_distances(tile, T::dims(p.D, chunk), distances);
  }
  if (own != chunks - 1) load_chunk(tile, p, n0, k0, own, fresh);
#pragma unroll
  for (int j = 0; j < T::TK; ++j) {
    const int64_t k = k0 + T::first_component() + j;
    const float constant = k < p.K ? p.constants[k] : 0.f;
#pragma unroll
    for (int i = 0; i < T::TN; ++i)
      logits[i][j] = p.is_allowed(n0 + T::first_row() + i, k) ? fmaf(-0.5f, distances[i][j], constant) : -INFINITY;
  }
}

// a of a tile: 0 where a component is not allowed. Leaves the chunk `own` in shared memory.
template <class T>
__device__ void tile_weights(const T& tile, const Problem& p, const Upstream& up, int64_t n0, int64_t k0, int64_t own,
                             Fresh fresh, float (&weights)[T::TN][T::TK]) {
  if (up.coef) load_chunk(tile, p, n0, k0, own, fresh);
  else tile_logits(tile, p, n0, k0, own, fresh, weights);
#pragma unroll
  for (int i = 0; i < T::TN; ++i) {
    const int64_t n = n0 + T::first_row() + i;
    const float grad = n < p.N ? up.grad[n] : 0.f, log_prob = n < p.N ? up.log_prob[n] : 0.f;
#pragma unroll
    for (int j = 0; j < T::TK; ++j) {
      const int64_t k = k0 + T::first_component() + j;
      float& w = weights[i][j];
      if (up.coef) w = p.is_allowed(n, k) ? up.coef[n * p.K + k] : 0.f;
      else w = w == -INFINITY ? 0.f : grad * fast_exp(w - log_prob);
    }
  }
}

}  // namespace latent_engine::gmm
