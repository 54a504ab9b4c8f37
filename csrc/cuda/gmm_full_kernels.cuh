// Kernels of the Gaussian-mixture log-density with full covariances, its gradients and its moments.
#pragma once

#include "gmm_full_tile.cuh"

namespace latent_engine::gmm_full {

constexpr int TILE_ROUND = 16;  // row tiles summed in float32 before they are added up in float64

// One thread a component.
static __global__ void prepare(const float* chol, const float* log_weights, int64_t K, int64_t D, float* constants) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (k >= K) return;
  double sum = -0.5 * static_cast<double>(D) * 1.8378770664093454836;  // ½ D log 2π
  for (int64_t d = 0; d < D; ++d) sum += log(static_cast<double>(chol[(k * D + d) * D + d]));
  constants[k] = static_cast<float>(log_weights[k] + sum);
}

// Blocks: row tiles × splits of the components. Writes the logits if asked to, and the log-density or its parts [splits, N].
static __global__ void __launch_bounds__(THREADS) forward_tiles(Problem p, int64_t components_each, float* logits_out,
                                                                float* log_prob, LogSum* parts) {
  const Tile tile(p);
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * ROWS, n = n0 + Tile::row();
  const int64_t begin = blockIdx.y * components_each, end = begin + components_each < p.K ? begin + components_each : p.K;
  LogSum sum;
  for (int64_t k = begin; k < end; ++k) {
    __syncthreads();
    tile.load_factor(p, k);
    tile.load_delta(p, n0, k);
    __syncthreads();
    tile.whiten();
    __syncthreads();
    const float logit = tile.logit(p.constants[k]);
    sum.merge(logit, 1.f);
    if (logits_out && n < p.N && Tile::is_first()) logits_out[n * p.K + k] = logit;
  }
  if (n >= p.N || !Tile::is_first()) return;
  if (parts) parts[blockIdx.y * p.N + n] = sum;
  else log_prob[n] = sum.value();
}

// Gradient of z, or its parts [splits, N, D]. Blocks: row tiles × splits of the components; a thread has TILES tiles of 4 rows
// × 4 dimensions.
template <int TILES>
__global__ void __launch_bounds__(THREADS) gradient_rows(Problem p, Upstream up, int64_t components_each, void* grad_z,
                                                         float* parts) {
  const Tile tile(p);
  const int64_t n0 = static_cast<int64_t>(blockIdx.x) * ROWS;
  const int64_t begin = blockIdx.y * components_each, end = begin + components_each < p.K ? begin + components_each : p.K;
  const int n = threadIdx.x % (ROWS / 4) * 4, group = threadIdx.x / (ROWS / 4) * 4;
  constexpr int STEP = THREADS / (ROWS / 4) * 4;  // dimensions between the tiles of a thread
  float total[TILES][4][4] = {};
  for (int64_t k = begin; k < end; ++k) {
    __syncthreads();
    tile.load_factor(p, k);
    tile.load_delta(p, n0, k);
    tile.weigh(p, up, n0, k);
    float a[4];
    load_four(tile.weights + n, a);
#pragma unroll
    for (int q = 0; q < TILES; ++q) {
      const int i = group + q * STEP;
      if (i >= tile.whole) continue;
      float sums[4][4] = {};
      for (int j = i; j < tile.whole; ++j) {
        float y[4];
        load_four(tile.white + j * LDN + n, y);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float entry = tile.factor[(i + c) * tile.ldp + j];
#pragma unroll
          for (int r = 0; r < 4; ++r) sums[c][r] = fmaf(y[r], entry, sums[c][r]);
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c)
#pragma unroll
        for (int r = 0; r < 4; ++r) total[q][c][r] -= a[r] != 0.f ? a[r] * sums[c][r] : 0.f;
    }
  }
#pragma unroll
  for (int q = 0; q < TILES; ++q)
#pragma unroll
    for (int c = 0; c < 4; ++c)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t at = n0 + n + r, d = group + q * STEP + c;
        if (at >= p.N || d >= p.D) continue;
        if (parts) parts[(blockIdx.y * p.N + at) * p.D + d] = total[q][c][r];
        else store(grad_z, p.z_type, at * p.D + d, total[q][c][r]);
      }
}

// Σ a [splits, K], Σ a δ [splits, K, D] and Σ a δ δᵀ [splits, K, D, D], the last from the diagonal up.
struct Sums {
  double *weight, *first, *second;
};

// The tiles of 4 × 4 from the diagonal up, row by row.
struct UpperTile {
  int i = 0, j = 0;

  __device__ UpperTile(int index, int across) {
    while (index >= across - i) index -= across - i, ++i;
    j = i + index;
    i *= 4, j *= 4;
  }
};

__device__ inline void add(double* to, double value, bool is_new) { *to = is_new ? value : *to + value; }

// Blocks: components × splits of the rows. A thread has TILES tiles of the second moment; few tiles are shared by several
// threads, each with its rows.
template <int TILES>
__global__ void __launch_bounds__(THREADS, 2) component_sums(Problem p, Upstream up, int64_t tiles_each, Sums out) {
  const Tile tile(p);
  const int64_t k = blockIdx.x, place = blockIdx.y * p.K + k;
  const int64_t row_tiles = (p.N + ROWS - 1) / ROWS;
  const int64_t begin = blockIdx.y * tiles_each, end = begin + tiles_each < row_tiles ? begin + tiles_each : row_tiles;
  const int across = tile.whole / 4, tiles = across * (across + 1) / 2, most = THREADS / tiles;
  const int shares = most > ROWS / 4 ? ROWS / 4 : most > 1 ? most : 1;
  const int own = threadIdx.x, mine = TILES > 1 ? own : own % tiles, share = TILES > 1 ? 0 : own / tiles;
  tile.load_factor(p, k);
  for (int64_t round = begin; round < end; round += TILE_ROUND) {
    float weight = 0.f, first = 0.f, second[TILES][4][4] = {};
    const int64_t round_end = round + TILE_ROUND < end ? round + TILE_ROUND : end;
    for (int64_t t = round; t < round_end; ++t) {
      __syncthreads();
      tile.load_delta(p, t * ROWS, k);
      weight += tile.weigh(p, up, t * ROWS, k);
      for (int at = threadIdx.x; at < tile.whole * ROWS; at += THREADS)  // rows that weigh nothing count for nothing
        if (tile.weights[at % ROWS] == 0.f) tile.delta[at / ROWS * LDN + at % ROWS] = 0.f;
      __syncthreads();
      if (own < tile.whole) {
        float sum = 0.f;
        for (int n = 0; n < ROWS; ++n) sum = fmaf(tile.weights[n], tile.delta[own * LDN + n], sum);
        first += sum;
      }
      if (share >= shares) continue;
#pragma unroll
      for (int q = 0; q < TILES; ++q) {
        if (mine + q * THREADS >= tiles) continue;
        const UpperTile at(mine + q * THREADS, across);
        for (int n = share * 4; n < ROWS; n += shares * 4) {
          float a[4], column[4][4];
          load_four(tile.weights + n, a);
#pragma unroll
          for (int j = 0; j < 4; ++j) load_four(tile.delta + (at.j + j) * LDN + n, column[j]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float row[4];
            load_four(tile.delta + (at.i + i) * LDN + n, row);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
              const float weighted = a[r] * row[r];
#pragma unroll
              for (int j = 0; j < 4; ++j) second[q][i][j] = fmaf(weighted, column[j][r], second[q][i][j]);
            }
          }
        }
      }
    }

    // The shares are added up in order, over δ and y: [shares][tiles][16].
    __syncthreads();
    float* const parts = tile.delta;
#pragma unroll
    for (int q = 0; q < TILES; ++q)
      if (share < shares && mine + q * THREADS < tiles)
#pragma unroll
        for (int i = 0; i < 4; ++i) store_four(parts + ((share * tiles + mine + q * THREADS) * 4 + i) * 4, second[q][i]);
    if (Tile::is_first()) tile.weights[Tile::row()] = weight;
    __syncthreads();
    for (int e = threadIdx.x; e < tiles * 16; e += THREADS) {
      const UpperTile at(e / 16, across);
      const int i = at.i + e % 16 / 4, j = at.j + e % 4;
      if (i > j || j >= p.D) continue;
      double sum = 0.0;
      for (int s = 0; s < shares; ++s) sum += parts[s * tiles * 16 + e];
      add(out.second + (place * p.D + i) * p.D + j, sum, round == begin);
    }
    if (own < p.D) add(out.first + place * p.D + own, first, round == begin);
    if (own == 0) {
      double sum = 0.0;
      for (int n = 0; n < ROWS; ++n) sum += tile.weights[n];
      add(out.weight + place, sum, round == begin);
    }
  }
}

static __global__ void merge_sums(Sums parts, int64_t splits, int64_t K, int64_t D, Sums out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, size = D > 0 ? D * D : 1;
  if (at >= K * size) return;
  const int64_t k = at / size, i = D > 0 ? at % size / D : 0, j = D > 0 ? at % D : 0;
  const auto total = [&](const double* from, int64_t place, int64_t stride) {
    double sum = 0.0;
    for (int64_t s = 0; s < splits; ++s) sum += from[s * stride + place];
    return sum;
  };
  if (at % size == 0) out.weight[k] = total(parts.weight, k, K);
  if (D == 0) return;
  if (i == 0) out.first[k * D + j] = total(parts.first, k * D + j, K * D);
  out.second[at] = total(parts.second, (k * D + (i < j ? i : j)) * D + (i < j ? j : i), K * D * D);
}

}  // namespace latent_engine::gmm_full
