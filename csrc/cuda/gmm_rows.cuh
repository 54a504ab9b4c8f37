// What the kernels of diagonal and full Gaussian mixtures share: the log-sum-exp of a row, and the merging of splits.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

namespace latent_engine::gmm {

struct Upstream {
  const float* grad;      // [N], of the log-density
  const float* log_prob;  // [N]
  const float* coef;      // [N, K], a where it is given, or null
};

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

static __global__ void merge_log_sums(const LogSum* parts, int64_t splits, int64_t N, float* log_prob) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (n >= N) return;
  LogSum row = parts[n];
  for (int64_t s = 1; s < splits; ++s) row.merge(parts[s * N + n].max, parts[s * N + n].sum);
  log_prob[n] = row.value();
}

// Logits [N, K] into responsibilities, in place.
static __global__ void normalise(float* logits, const float* log_prob, int64_t N, int64_t K) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= N * K) return;
  const float log_sum = log_prob[i / K];
  logits[i] = expf(logits[i] - (log_sum == -INFINITY ? 0.f : log_sum));
}

static __global__ void merge_rows(const float* parts, int64_t splits, int64_t size, void* grad_z, Scalar type) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int64_t s = 0; s < splits; ++s) sum += parts[s * size + i];
  store(grad_z, type, i, sum);
}

}  // namespace latent_engine::gmm
