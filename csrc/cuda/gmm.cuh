// Density of a Gaussian mixture and its gradients on raw pointers; notation and formulas are in kernels/gmm.py.
//
// A block works through tiles of rows × components, each thread on a few rows times four components in registers, with
// D in chunks that fit shared memory. δ = z − μ is formed before it is scaled. At μ = 10 and σ² = e^-30 the pre-scaled
// form z/σ − μ/σ, one operation of three cheaper, is off by up to 2 nats, and the expanded form by 10^7: fp32 and tf32x3
// alike. So the pairs cost 3·D operations forward and 6·D to 7·D in each backward pass, and no tensor core is used.
//
// A component that is not allowed, or a row without any, has weight 0 whatever its numbers are. The gradient passes
// replace non-finite numbers by 0 after the weights are known: where they matter the weight is NaN already.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace latent_engine::gmm {

constexpr int TILE_ROUND = 64;  // row tiles summed in registers before they are added to the workspace

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

struct Upstream {
  const float* grad;      // [N], of the log-density
  const float* log_prob;  // [N]
  const float* coef;      // [N, K], a where it is given, or null
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
  __device__ static int dims(int64_t D, int64_t chunk) { return static_cast<int>(D - chunk * C < C ? D - chunk * C : C); }

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

// The logits of a tile, −inf where a component is not allowed. Leaves the chunk `own` in shared memory. Every kernel sums
// in the same order: a dominant component then has l = log p to the bit, and weight 1.
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

// One warp a component.
__global__ void prepare(const float* log_vars, int64_t stride_k, int64_t stride_d, const float* log_weights, int64_t K,
                        int64_t D, float* inv_vars, float* constants) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  double sum = 0.0;
  if (k < K)
    for (int64_t d = lane; d < D; d += 32) {
      const float log_var = log_vars[k * stride_k + d * stride_d];
      inv_vars[k * D + d] = expf(-log_var);
      sum += log_var;
    }
  for (int w = 1; w < 32; w *= 2) sum += from_lane_xor(sum, w);
  if (k < K && lane == 0)
    constants[k] = static_cast<float>(log_weights[k] - 0.5 * (sum + static_cast<double>(D) * 1.8378770664093454836));
}

// A running log-sum-exp. It starts at a finite maximum, so that −inf needs no case of its own; NaN lives in the sum.
struct LogSum {
  float max = -FLT_MAX, sum = 0.f;

  __device__ void merge(float other_max, float other_sum) {
    const float top = fmaxf(max, other_max);
    sum = sum * fast_exp(max - top) + other_sum * fast_exp(other_max - top);
    max = top;
  }
  __device__ float value() const { return max + logf(sum); }
};

// Blocks: row tiles × splits of the components. Writes the logits if asked to, and the log-density, or its parts [splits, N].
template <class T>
__global__ void __launch_bounds__(THREADS) forward_tiles(Problem p, int64_t tiles_per_split, float* logits_out,
                                                         float* log_prob, LogSum* parts) {
  const T tile;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * T::N;
  const int64_t begin = blockIdx.y * tiles_per_split * T::K;
  const int64_t end = begin + tiles_per_split * T::K < p.K ? begin + tiles_per_split * T::K : p.K;
  LogSum rows[T::TN];
  for (int64_t k0 = begin; k0 < end; k0 += T::K) {
    float logits[T::TN][T::TK];
    tile_logits(tile, p, n0, k0, T::chunks(p.D) - 1, k0 == begin ? Fresh::both : Fresh::components, logits);
#pragma unroll
    for (int i = 0; i < T::TN; ++i) {
      float top = rows[i].max;
#pragma unroll
      for (int j = 0; j < T::TK; ++j) top = fmaxf(top, logits[i][j]);
      float sum = rows[i].sum * fast_exp(rows[i].max - top);
#pragma unroll
      for (int j = 0; j < T::TK; ++j) sum += fast_exp(logits[i][j] - top);
      rows[i].max = top, rows[i].sum = sum;
      const int64_t n = n0 + T::first_row() + i, k = k0 + T::first_component();
      if (logits_out && n < p.N)
#pragma unroll
        for (int j = 0; j < T::TK; ++j)
          if (k + j < p.K) logits_out[n * p.K + k + j] = logits[i][j];
    }
  }
#pragma unroll
  for (int i = 0; i < T::TN; ++i) {
    for (int w = 1; w < T::GROUPS; w *= 2) {
      const float other_max = from_lane_xor(rows[i].max, w), other_sum = from_lane_xor(rows[i].sum, w);
      rows[i].merge(other_max, other_sum);
    }
    const int64_t n = n0 + T::first_row() + i;
    if (T::first_component() != 0 || n >= p.N) continue;
    if (parts) parts[blockIdx.y * p.N + n] = rows[i];
    else log_prob[n] = rows[i].value();
  }
}

__global__ void merge_log_sums(const LogSum* parts, int64_t splits, int64_t N, float* log_prob) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= N) return;
  LogSum row = parts[n];
  for (int64_t s = 1; s < splits; ++s) row.merge(parts[s * N + n].max, parts[s * N + n].sum);
  log_prob[n] = row.value();
}

// Logits [N, K] into responsibilities, in place.
__global__ void normalise(float* logits, const float* log_prob, int64_t N, int64_t K) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= N * K) return;
  const float log_sum = log_prob[i / K];
  logits[i] = expf(logits[i] - (log_sum == -INFINITY ? 0.f : log_sum));
}

// Gradient of z. Blocks: row tiles × splits of the components × chunks, each block for the dimensions of its own chunk.
// Beyond 64 dimensions the logits are computed once for each chunk. Writes dz, or parts [splits, N, D] of it.
template <class T>
__global__ void __launch_bounds__(THREADS) backward_rows(Problem p, Upstream up, int64_t tiles_per_split, void* grad_z,
                                                         float* parts) {
  constexpr int PD = T::C >= 16 ? 4 : 2, LANES = T::C / PD, PN = T::N * LANES / THREADS;
  const T tile;
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * T::N, own = blockIdx.z;
  const int64_t begin = blockIdx.y * tiles_per_split * T::K;
  const int64_t end = begin + tiles_per_split * T::K < p.K ? begin + tiles_per_split * T::K : p.K;
  const int d0 = threadIdx.x % LANES, row0 = threadIdx.x / LANES * PN;  // dimensions d0, d0 + LANES, ...
  float total[PN][PD] = {};
  for (int64_t k0 = begin; k0 < end; k0 += T::K) {
    float weights[T::TN][T::TK];
    tile_weights(tile, p, up, n0, k0, own, k0 == begin ? Fresh::both : Fresh::components, weights);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < T::TK; ++j)
#pragma unroll
      for (int i = 0; i < T::TN; ++i)
        tile.weights[(T::first_component() + j) * T::LDN + T::first_row() + i] = weights[i][j];
    for (int i = threadIdx.x; i < 2 * T::C * T::LDK; i += THREADS) tile.means[i] = finite_or_zero(tile.means[i]);
    __syncthreads();

    float z[PN][PD], part[PN][PD] = {};
#pragma unroll
    for (int i = 0; i < PN; ++i)
#pragma unroll
      for (int q = 0; q < PD; ++q) z[i][q] = finite_or_zero(tile.z[(d0 + q * LANES) * T::LDN + row0 + i]);
    const int count = static_cast<int>(end - k0 < T::K ? end - k0 : T::K);
#pragma unroll 2
    for (int k = 0; k < count; ++k) {
      float a[PN];
      load_vector(tile.weights + k * T::LDN + row0, a);
#pragma unroll
      for (int q = 0; q < PD; ++q) {
        const float mean = tile.means[(d0 + q * LANES) * T::LDK + k];
        const float inv_var = tile.inv_vars[(d0 + q * LANES) * T::LDK + k];
#pragma unroll
        for (int i = 0; i < PN; ++i) part[i][q] = fmaf(a[i] * inv_var, z[i][q] - mean, part[i][q]);
      }
    }
#pragma unroll
    for (int i = 0; i < PN; ++i)
#pragma unroll
      for (int q = 0; q < PD; ++q) total[i][q] -= part[i][q];
  }
#pragma unroll
  for (int i = 0; i < PN; ++i)
#pragma unroll
    for (int q = 0; q < PD; ++q) {
      const int64_t n = n0 + row0 + i, d = own * T::C + d0 + q * LANES;
      if (n >= p.N || d >= p.D) continue;
      if (parts) parts[(blockIdx.y * p.N + n) * p.D + d] = total[i][q];
      else store(grad_z, p.z_type, n * p.D + d, total[i][q]);
    }
}

__global__ void merge_rows(const float* parts, int64_t splits, int64_t size, void* grad_z, Scalar type) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int64_t s = 0; s < splits; ++s) sum += parts[s * size + i];
  store(grad_z, type, i, sum);
}

// Sums over rows of a, a δ and a δ²; each split of the rows has its own, added up in order afterwards.
struct Moments {
  float* weight;  // [splits, K]
  float* first;   // [splits, K, D]
  float* second;  // [splits, K, D]
};

// Blocks: component tiles × splits of the rows × chunks, each block for the dimensions of its own chunk.
template <class T>
__global__ void __launch_bounds__(THREADS) backward_components(Problem p, Upstream up, int64_t tiles_per_split, Moments out) {
  constexpr int PD = 4, LANES = T::C / PD;                       // dimensions d0, d0 + LANES, ...
  constexpr int PK = T::K * LANES / THREADS > 4 ? 8 : 4;         // components of a thread
  constexpr int SHARES = THREADS / (T::K / PK * LANES);          // threads that share an output, each with its rows
  static_assert(SHARES <= 32);
  const T tile;
  const int64_t k0 = static_cast<int64_t>(blockIdx.x) * T::K, own = blockIdx.z;
  const int share = threadIdx.x % SHARES, d0 = threadIdx.x / SHARES % LANES, c0 = threadIdx.x / (SHARES * LANES) * PK;
  const int64_t begin = blockIdx.y * tiles_per_split * T::N;
  const int64_t end = begin + tiles_per_split * T::N < p.N ? begin + tiles_per_split * T::N : p.N;
  for (int64_t round = begin; round < end; round += TILE_ROUND * T::N) {
    float weight[PK] = {}, first[PK][PD] = {}, second[PK][PD] = {};
    const int64_t round_end = round + TILE_ROUND * T::N < end ? round + TILE_ROUND * T::N : end;
    for (int64_t n0 = round; n0 < round_end; n0 += T::N) {
      {
        float weights[T::TN][T::TK];
        tile_weights(tile, p, up, n0, k0, own, n0 == begin ? Fresh::both : Fresh::z, weights);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < T::TN; ++i)
#pragma unroll
          for (int j = 0; j < T::TK; ++j)
            tile.weights[(T::first_row() + i) * T::LDK + T::first_component() + j] = weights[i][j];
      }
      for (int i = threadIdx.x; i < T::C * T::LDN; i += THREADS) tile.z[i] = finite_or_zero(tile.z[i]);
      __syncthreads();

      float mean[PK][PD];
#pragma unroll
      for (int j = 0; j < PK; ++j)
#pragma unroll
        for (int q = 0; q < PD; ++q) mean[j][q] = finite_or_zero(tile.means[(d0 + q * LANES) * T::LDK + c0 + j]);
      const int count = static_cast<int>(round_end - n0 < T::N ? round_end - n0 : T::N);
      for (int n = share; n < count; n += SHARES) {
        float a[PK];
        load_vector(tile.weights + n * T::LDK + c0, a);
#pragma unroll
        for (int j = 0; j < PK; ++j) weight[j] += a[j];
#pragma unroll
        for (int q = 0; q < PD; ++q) {
          const float z = tile.z[(d0 + q * LANES) * T::LDN + n];
#pragma unroll
          for (int j = 0; j < PK; ++j) {
            const float delta = z - mean[j][q], weighted = a[j] * delta;
            first[j][q] += weighted;
            second[j][q] = fmaf(weighted, delta, second[j][q]);
          }
        }
      }
    }

    const auto add = [&](float* to, float value, bool mine) {
      for (int w = 1; w < SHARES; w *= 2) value += from_lane_xor(value, w);
      if (mine && share == 0) *to = round == begin ? value : *to + value;
    };
#pragma unroll
    for (int j = 0; j < PK; ++j) {
      const int64_t row = blockIdx.y * p.K + k0 + c0 + j;
      const bool mine = k0 + c0 + j < p.K;
      add(out.weight + row, weight[j], mine && d0 == 0 && own == 0);
#pragma unroll
      for (int q = 0; q < PD; ++q) {
        const int64_t d = own * T::C + d0 + q * LANES;
        add(out.first + row * p.D + d, first[j][q], mine && d < p.D);
        add(out.second + row * p.D + d, second[j][q], mine && d < p.D);
      }
    }
  }
}

__global__ void merge_components(Moments parts, int64_t splits, const float* inv_vars, int64_t K, int64_t D,
                                 float* grad_means, float* grad_log_vars, float* grad_log_weights) {
  const int64_t columns = D > 0 ? D : 1;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= K * columns) return;
  const int64_t k = i / columns;
  float weight = 0.f, first = 0.f, second = 0.f;
#pragma unroll 4
  for (int64_t s = 0; s < splits; ++s) {
    weight += parts.weight[s * K + k];
    if (D == 0) continue;
    first += parts.first[s * K * D + i];
    second += parts.second[s * K * D + i];
  }
  if (i % columns == 0) grad_log_weights[k] = weight;
  if (D == 0) return;
  const float inv_var = finite_or_zero(inv_vars[i]);
  grad_means[i] = inv_var * first;
  grad_log_vars[i] = 0.5f * (inv_var * second - weight);
}

// Launches. `workspace(count)` gives that many floats that live until the stream has run.

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

struct Split {
  int64_t count, tiles_each;

  // Enough splits of `tiles` to fill the device, given the blocks that there are anyway.
  Split(int64_t tiles, int64_t blocks) {
    const int64_t wanted = tiles_of(WAVE, blocks > 0 ? blocks : 1);
    tiles_each = tiles_of(tiles, wanted < tiles ? wanted : (tiles > 0 ? tiles : 1));
    count = tiles_each > 0 ? tiles_of(tiles, tiles_each) : 1;
  }
};

inline dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

template <class T>
struct Use {
  using Tile = T;
};

// Calls `run` with the tile for the shape: few components leave a wide tile idle, few dimensions a deep one.
template <class Run>
void with_tile(int64_t K, int64_t D, Run run) {
  if (K <= 16) {
    if (D <= 4) run(Use<Tile<128, 16, 4>>());
    else if (D <= 16) run(Use<Tile<128, 16, 16>>());
    else run(Use<Tile<128, 16, 64>>());
  } else if (D <= 4) run(Use<Tile<64, 64, 4>>());
  else if (D <= 16) run(Use<Tile<64, 64, 16>>());
  else if (D <= 32) run(Use<Tile<64, 64, 32>>());
  else run(Use<Tile<64, 64, 64>>());
}

struct LogVars {
  const float* data;
  int64_t stride_k, stride_d;
};

// Fills `inv_vars` and `constants` of the problem.
template <class Workspace>
void prepare_mixture(Problem& p, LogVars log_vars, const float* log_weights, Workspace& workspace, cudaStream_t stream) {
  if (p.K == 0) return;
  float *inv_vars = workspace(p.K * p.D), *constants = workspace(p.K);
  launch(prepare, grid(tiles_of(p.K, THREADS / 32)), 0, stream, log_vars.data, log_vars.stride_k, log_vars.stride_d,
         log_weights, p.K, p.D, inv_vars, constants);
  p.inv_vars = inv_vars, p.constants = constants;
}

// log_prob [N], and responsibilities [N, K] unless null.
template <class Workspace>
void forward(const Problem& p, float* log_prob, float* responsibilities, Workspace& workspace, cudaStream_t stream) {
  if (p.N == 0) return;
  with_tile(p.K, p.D, [&](auto use) {
    using T = typename decltype(use)::Tile;
    const int64_t row_tiles = tiles_of(p.N, T::N);
    const Split split(tiles_of(p.K, T::K), row_tiles);
    auto* parts = split.count > 1 ? reinterpret_cast<LogSum*>(workspace(2 * split.count * p.N)) : nullptr;
    launch(forward_tiles<T>, grid(row_tiles, split.count), T::FORWARD_FLOATS, stream, p, split.tiles_each, responsibilities,
           log_prob, parts);
    if (parts) launch(merge_log_sums, grid(tiles_of(p.N, THREADS)), 0, stream, parts, split.count, p.N, log_prob);
  });
  if (responsibilities && p.K > 0)
    launch(normalise, grid(tiles_of(p.N * p.K, THREADS)), 0, stream, responsibilities, log_prob, p.N, p.K);
}

// grad_z [N, D] in the type of z.
template <class Workspace>
void backward_z(const Problem& p, const Upstream& up, void* grad_z, Workspace& workspace, cudaStream_t stream) {
  if (p.N * p.D == 0) return;
  with_tile(p.K, p.D, [&](auto use) {
    using T = typename decltype(use)::Tile;
    const int64_t row_tiles = tiles_of(p.N, T::N), chunks = T::chunks(p.D);
    const Split split(tiles_of(p.K, T::K), row_tiles * chunks);
    float* parts = split.count > 1 ? workspace(split.count * p.N * p.D) : nullptr;
    launch(backward_rows<T>, grid(row_tiles, split.count, chunks), T::ROWS_FLOATS, stream, p, up, split.tiles_each, grad_z,
           parts);
    if (parts)
      launch(merge_rows, grid(tiles_of(p.N * p.D, THREADS)), 0, stream, parts, split.count, p.N * p.D, grad_z, p.z_type);
  });
}

// grad_means [K, D], grad_log_vars [K, D], grad_log_weights [K]. With no rows nothing is written: pass zeros.
template <class Workspace>
void backward_mixture(const Problem& p, const Upstream& up, float* grad_means, float* grad_log_vars,
                      float* grad_log_weights, Workspace& workspace, cudaStream_t stream) {
  if (p.N * p.K == 0) return;
  with_tile(p.K, p.D, [&](auto use) {
    using T = typename decltype(use)::Tile;
    const int64_t component_tiles = tiles_of(p.K, T::K), chunks = T::chunks(p.D);
    const Split split(tiles_of(p.N, T::N), component_tiles * chunks);
    const int64_t outputs = split.count * p.K;
    const Moments parts{workspace(outputs), workspace(outputs * p.D), workspace(outputs * p.D)};
    launch(backward_components<T>, grid(component_tiles, split.count, chunks), T::COMPONENTS_FLOATS, stream, p, up,
           split.tiles_each, parts);
    launch(merge_components, grid(tiles_of(p.K * (p.D > 0 ? p.D : 1), THREADS)), 0, stream, parts, split.count, p.inv_vars,
           p.K, p.D, grad_means, grad_log_vars, grad_log_weights);
  });
}

}  // namespace latent_engine::gmm
