// Kernels of logistic_mixture_log_prob and their launches; formulas and notation are in kernels/logistic_mixture.py.
//
// A thread has a pixel and goes through the components, whose planes of parameters a warp reads in order and once (logits
// twice): 40 bytes, 9 exps and about 200 other operations a component of three channels, near the balance of memory and
// arithmetic of an H200. As P = ratio · e^linear with the ratio between 2e-6 and 614, only the linear parts take part in the
// maximum of the log-sum-exp, and no component costs a logarithm.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "launch.cuh"

namespace latent_engine::logistic_mixture {

constexpr float HALF_BIN = 1.f / 255.f, LOG_BIN = -4.84811636f;  // log(2/255)

struct Problem {
  const float* x;       // [N, C, P]
  const void* params;   // [images, rows · K, P]
  Scalar type;          // of the parameters and their gradient
  const bool* mask;     // [N, P] or null: the pixels that count
  int64_t images, N, C, K, P;

  __host__ __device__ int64_t rows() const { return C == 3 ? 10 : 3; }
  __host__ __device__ int64_t parts() const { return (P + THREADS - 1) / THREADS; }
  __device__ int64_t at(int64_t image, int row, int64_t k, int64_t pixel) const {
    return ((image * rows() + row) * K + k) * P + pixel;
  }
};

// The pixel of a thread.
template <int C>
struct Pixel {
  int64_t image, index;
  bool counts;
  float x[C], side[C], centre[C];  // side: 1 for the bin open to −∞, −1 for that open to ∞, else 0

  __device__ explicit Pixel(const Problem& p) {
    image = blockIdx.x / p.parts(), index = blockIdx.x % p.parts() * THREADS + threadIdx.x;
    const int64_t row = image % p.N;
    counts = index < p.P && (!p.mask || p.mask[row * p.P + index]);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      x[c] = counts ? p.x[(row * C + c) * p.P + index] : 0.f;
      side[c] = x[c] < HALF_BIN - 1.f ? 1.f : x[c] > 1.f - HALF_BIN ? -1.f : 0.f;
      centre[c] = x[c] + side[c] * HALF_BIN;
    }
  }
};

// One component at one pixel: P = ratio · e^linear and, by channel, what its gradients need.
template <int C>
struct Component {
  float ratio, linear, coef[3];  // coefficients after tanh: green on red, blue on red, blue on green
  float log_scale[C], inv[C], t[C], y2[C], u[C], sinh[C], cosh[C], den[C];

  __device__ Component(const Problem& p, const Pixel<C>& pixel, int64_t k) {
    const auto parameter = [&](int row) { return load(p.params, p.type, p.at(pixel.image, row, k, pixel.index)); };
    float mean[C], num = 1.f, product = 1.f;
    linear = 0.f;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      mean[c] = parameter(1 + 3 * c), log_scale[c] = parameter(2 + 3 * c);
      if (C == 3) coef[c] = tanhf(parameter(3 + 3 * c));
    }
    if constexpr (C == 3) {
      mean[1] += coef[0] * pixel.x[0];
      mean[2] += coef[1] * pixel.x[0] + coef[2] * pixel.x[1];
    }
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float clamped = log_scale[c] < -7.f ? -7.f : log_scale[c], side = pixel.side[c];
      inv[c] = expf(-clamped);  // t carries its relative error: not by fast_exp
      t[c] = (pixel.centre[c] - mean[c]) * inv[c];
      u[c] = fast_exp(-fabsf(t[c]));
      y2[c] = HALF_BIN * inv[c] * (HALF_BIN * inv[c]);
      hyperbolic(y2[c], sinh[c], cosh[c]);
      den[c] = 1.f + u[c] * (side != 0.f ? 1.f : u[c] + cosh[c]);
      const float towards = side * t[c];
      linear += side != 0.f ? (towards > 0.f ? 0.f : towards) : LOG_BIN - clamped - fabsf(t[c]);
      num *= side != 0.f ? 1.f : sinh[c];
      product *= den[c];
    }
    ratio = num / product;
  }

  // sinh(y) / y and 2 cosh(y) on y ≤ e^7/255; minimax, to 3e-8 and 3e-9.
  static __device__ void hyperbolic(float y2, float& s, float& c) {
    s = fmaf(y2, 2.13218803419500071e-10f, 2.37777007232384583e-8f);
    s = fmaf(y2, fmaf(y2, s, 2.77039731952736165e-6f), 0.000198329133657527843f);
    s = fmaf(y2, fmaf(y2, fmaf(y2, s, 0.00833355077003289257f), 0.166666465932763654f), 1.f);
    c = fmaf(y2, fmaf(y2, 3.01667045175190519e-11f, 3.97693134121339865e-9f), 5.53850517051110588e-7f);
    c = fmaf(y2, fmaf(y2, fmaf(y2, c, 0.0000495836325305064173f), 0.00277785058387191846f), 0.0833332089805364306f);
    c = fmaf(y2, fmaf(y2, c, 1.00000007349960256f), 2.f);
  }
};

// Adds ratio · e^exponent to sum · e^top. A finite first maximum spares −∞ a case of its own; NaN lives in the sum.
__device__ inline void add_exponential(float exponent, float ratio, float& top, float& sum) {
  const float smaller = fast_exp(-fabsf(exponent - top));
  sum = exponent > top ? sum * smaller + ratio : sum + smaller * ratio;
  top = exponent > top ? exponent : top;
}

// The sum over a block, in fixed order; the result is that of thread 0.
__device__ inline float block_sum(float value) {
  float* const warps = shared_memory();
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += from_lane_xor(value, lanes);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.f;
  for (int w = 0; w < THREADS / 32; ++w) value += warps[w];
  return value;
}

// sums [images, parts]; stats [images, 4, P] or null. The largest logit is taken out of every exponent first: a level that all
// logits share costs no digits. The second time the logits come from the cache.
template <int C>
__global__ void __launch_bounds__(THREADS) forward_parts(Problem p, float* sums, float* stats) {
  const Pixel<C> pixel(p);
  float log_prob = 0.f;
  if (pixel.counts) {
    float level = -FLT_MAX, top = -FLT_MAX, sum = 0.f, prior = 0.f;
    const auto logit = [&](int64_t k) { return load(p.params, p.type, p.at(pixel.image, 0, k, pixel.index)); };
    for (int64_t k = 0; k < p.K; ++k) level = fmaxf(level, logit(k));
    for (int64_t k = 0; k < p.K; ++k) {
      const Component<C> m(p, pixel, k);
      add_exponential((logit(k) - level) + m.linear, m.ratio, top, sum);
      prior += fast_exp(logit(k) - level);
    }
    prior = logf(prior);
    log_prob = top + (logf(sum) - prior);
    if (stats) {
      float* const to = stats + 4 * pixel.image * p.P + pixel.index;
      to[0] = level, to[p.P] = top, to[2 * p.P] = sum, to[3 * p.P] = prior;
    }
  }
  const float total = block_sum(log_prob);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

__global__ void merge_parts(const float* sums, int64_t images, int64_t parts, float* log_prob) {
  const int64_t image = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (image >= images) return;
  double total = 0;
#pragma unroll 4
  for (int64_t i = 0; i < parts; ++i) total += sums[image * parts + i];
  log_prob[image] = static_cast<float>(total);
}

// grad_params [images, rows · K, P] in the type of the parameters; 0 for pixels that do not count.
template <int C>
__global__ void __launch_bounds__(THREADS)
    backward_pixels(Problem p, const float* grad, const float* stats, void* grad_params) {
  const Pixel<C> pixel(p);
  if (pixel.index >= p.P) return;
  if (!pixel.counts) {
    for (int64_t plane = 0; plane < p.rows() * p.K; ++plane)
      store(grad_params, p.type, (pixel.image * p.rows() * p.K + plane) * p.P + pixel.index, 0.f);
    return;
  }
  const float* const saved = stats + 4 * pixel.image * p.P + pixel.index;
  const float g = grad[pixel.image], level = saved[0], top = saved[p.P], over_sum = g / saved[2 * p.P], prior = saved[3 * p.P];
  for (int64_t k = 0; k < p.K; ++k) {
    const auto put = [&](int row, float value) {
      store(grad_params, p.type, p.at(pixel.image, row, k, pixel.index), value);
    };
    const float logit = load(p.params, p.type, p.at(pixel.image, 0, k, pixel.index)) - level;
    const Component<C> m(p, pixel, k);
    const float weight = over_sum * m.ratio * fast_exp(logit + m.linear - top);
    put(0, weight - g * fast_exp(logit - prior));
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const float side = pixel.side[c], t = m.t[c], u = m.u[c];
      const float inside = copysignf((1.f - u * u) / m.den[c], -t), open = side * (side * t < 0.f ? 1.f : u) / m.den[c];
      const float slope = side != 0.f ? open : inside, mean = -weight * m.inv[c] * slope;
      const float width = side != 0.f ? 0.f : 2.f * u * m.y2[c] * m.sinh[c] / m.den[c] - 0.5f * m.cosh[c] / m.sinh[c];
      put(1 + 3 * c, mean);
      put(2 + 3 * c, m.log_scale[c] < -7.f ? 0.f : weight * (width - t * slope));
      if (c == 1) put(3, mean * pixel.x[0] * (1.f - m.coef[0] * m.coef[0]));
      if (c == 2) {
        put(6, mean * pixel.x[0] * (1.f - m.coef[1] * m.coef[1]));
        put(9, mean * pixel.x[1] * (1.f - m.coef[2] * m.coef[2]));
      }
    }
  }
}

// log_prob [images], stats or null; `workspace(count)` gives floats that live until the stream has run.
template <class Workspace>
void forward(const Problem& p, float* log_prob, float* stats, Workspace& workspace, cudaStream_t stream) {
  if (p.images == 0) return;
  const int64_t blocks = p.images * p.parts();
  float* const sums = workspace(blocks);
  if (blocks > 0)
    launch(p.C == 3 ? forward_parts<3> : forward_parts<1>, grid(blocks), THREADS / 32, stream, p, sums, stats);
  launch(merge_parts, grid(tiles_of(p.images, THREADS)), 0, stream, sums, p.images, p.parts(), log_prob);
}

inline void backward(const Problem& p, const float* grad, const float* stats, void* grad_params, cudaStream_t stream) {
  if (p.images * p.P == 0) return;
  launch(p.C == 3 ? backward_pixels<3> : backward_pixels<1>, grid(p.images * p.parts()), 0, stream, p, grad, stats,
         grad_params);
}

}  // namespace latent_engine::logistic_mixture
