// Kernels of the Gaussian-mixture log-density and its gradients; notation and formulas are in kernels/gmm.py.
#pragma once

#include "gmm_tile.cuh"

namespace latent_engine::gmm {

constexpr int TILE_ROUND = 64;  // row tiles summed in registers before they are added to the workspace

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

// Blocks: row tiles × splits of the components. Writes the logits if asked to, and the log-density or its parts
// [splits, N].
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

// Gradient of z. Blocks: row tiles × splits of the components × chunks, each block for the dimensions of its own chunk.
// With several chunks (D > 64, or 32 with few components) each computes the logits again. Writes dz or its parts
// [splits, N, D].
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

// Sums over rows of a, a δ and a δ²; each split of the rows has its own, added up in order afterwards.
struct Moments {
  float* weight;  // [splits, K]
  float* first;   // [splits, K, D]
  float* second;  // [splits, K, D]
};

// Blocks: component tiles × splits of the rows × chunks, each block for the dimensions of its own chunk.
template <class T>
__global__ void __launch_bounds__(THREADS, 2) backward_components(Problem p, Upstream up, int64_t tiles_per_split,
                                                                  Moments out) {
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

// Without `inv_vars`, Σ a δ and Σ a δ² instead of the gradients of means and log_vars.
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
  const float inv_var = inv_vars ? finite_or_zero(inv_vars[i]) : 1.f;
  grad_means[i] = inv_var * first;
  grad_log_vars[i] = inv_vars ? 0.5f * (inv_var * second - weight) : second;
}

}  // namespace latent_engine::gmm
