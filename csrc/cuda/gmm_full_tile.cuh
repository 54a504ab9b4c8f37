// Tiles of rows × one component of a Gaussian mixture with full covariances; notation and formulas are in kernels/gmm_full.py.
//
// A block holds δ of its rows, the factor P of one component and y = δ P in shared memory, all of D at once, and each thread
// makes 4 × 4 values of a product in registers. P has zeros below its diagonal there, of which the products skip whole tiles.
#pragma once

#include "gmm_rows.cuh"

namespace latent_engine::gmm_full {

using gmm::LogSum;
using gmm::Upstream;

constexpr int ROWS = 64, LDN = ROWS + 4;  // of a tile, and the leading dimension: aligned, fewer bank conflicts
constexpr int MAX_DIM = 128;

struct Problem {
  const void* z;  // [N, D]
  Scalar z_type;
  int64_t z_row, z_col;    // strides of z
  const float* means;      // [K, D]
  const float* chol;       // [K, D, D], read from the diagonal up
  const float* constants;  // [K], log_weights + Σ_d log P_dd − ½ D log 2π
  int64_t N, K, D;

  // Dimensions in whole tiles.
  __host__ __device__ int whole() const { return D > 4 ? static_cast<int>((D + 3) / 4 * 4) : 4; }
  __host__ __device__ int shared_floats() const { return 2 * whole() * LDN + whole() * (whole() + 4) + ROWS; }
};

__device__ inline void load_four(const float* from, float (&to)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ inline void store_four(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = float4{from[0], from[1], from[2], from[3]};
}

struct Tile {
  int whole, ldp;
  float *delta, *white;  // [whole][LDN]
  float* factor;         // [whole][ldp]
  float* weights;        // [ROWS]

  __device__ explicit Tile(const Problem& p) : whole(p.whole()), ldp(whole + 4) {
    delta = shared_memory(), white = delta + whole * LDN;
    factor = white + whole * LDN, weights = factor + whole * ldp;
  }

  // Two threads share a row.
  __device__ static int row() { return threadIdx.x / 2; }
  __device__ static bool is_first() { return threadIdx.x % 2 == 0; }

  __device__ void load_factor(const Problem& p, int64_t k) const {
    for (int at = threadIdx.x; at < whole * whole; at += THREADS) {
      const int i = at / whole, j = at % whole;
      factor[i * ldp + j] = i <= j && j < p.D ? p.chol[(k * p.D + i) * p.D + j] : 0.f;
    }
  }

  __device__ void load_delta(const Problem& p, int64_t n0, int64_t k) const {
    for (int at = threadIdx.x; at < whole * ROWS; at += THREADS) {
      const int d = at % whole, n = at / whole;
      const bool inside = n0 + n < p.N && d < p.D;
      delta[d * LDN + n] = inside ? load(p.z, p.z_type, (n0 + n) * p.z_row + d * p.z_col) - p.means[k * p.D + d] : 0.f;
    }
  }

  // white = δ P.
  __device__ void whiten() const {
    for (int at = threadIdx.x; at < ROWS / 4 * (whole / 4); at += THREADS) {
      const int n = at % (ROWS / 4) * 4, j = at / (ROWS / 4) * 4;
      float sums[4][4] = {};
      for (int i = 0; i < j + 4; ++i) {
        float d[4], p[4];
        load_four(delta + i * LDN + n, d);
        load_four(factor + i * ldp + j, p);
#pragma unroll
        for (int c = 0; c < 4; ++c)
#pragma unroll
          for (int r = 0; r < 4; ++r) sums[c][r] = fmaf(d[r], p[c], sums[c][r]);
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) store_four(white + (j + c) * LDN + n, sums[c]);
    }
  }

  // Logit of the thread's row, which both of its threads get.
  __device__ float logit(float constant) const {
    float square = 0.f;
    for (int d = threadIdx.x % 2; d < whole; d += 2) square = fmaf(white[d * LDN + row()], white[d * LDN + row()], square);
    return fmaf(-0.5f, square + from_lane_xor(square, 1), constant);
  }

  // With δ and the factor loaded: y, and a of every row in `weights`, which is returned for the thread's row.
  __device__ float weigh(const Problem& p, const Upstream& up, int64_t n0, int64_t k) const {
    __syncthreads();
    whiten();
    __syncthreads();
    const float l = logit(p.constants[k]);
    const int64_t n = n0 + row();
    float a = 0.f;
    if (n < p.N) {
      if (up.coef) a = up.coef[n * p.K + k];
      else if (l != -INFINITY) a = (up.grad ? up.grad[n] : 1.f) * expf(l - up.log_prob[n]);
    }
    if (is_first()) weights[row()] = a;
    __syncthreads();
    return a;
  }
};

}  // namespace latent_engine::gmm_full
