// One struct a likelihood: the sum of log-densities over entries, and their gradients.
#pragma once

#include <cmath>
#include <cstdint>

namespace latent_engine::likelihood {

struct Entry {
  float x, a, b;
};

struct Gradients {
  float x, a, b;
};

// Σ log(1 + e) for e ≤ 1 as log(1 + q) with 1 + q = Π(1 + e), to full relative accuracy: one log for 64 of them.
class LogProduct {
 public:
  __device__ void add(float e) {
    q_ = q_ + e + q_ * e;
    if (++count_ == 64) sum_ += log1pf(q_), q_ = 0.f, count_ = 0;
  }
  __device__ float log() const { return sum_ + log1pf(q_); }

 private:
  float q_ = 0.f, sum_ = 0.f;
  int count_ = 0;
};

__device__ inline float sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x > 0.f ? 1.f : e) / (1.f + e);
}

__device__ inline float positive(float x) { return x < 0.f ? 0.f : x; }  // NaN stays NaN

struct Bernoulli {
  struct Sum {
    float linear = 0.f;
    LogProduct product;

    __device__ void add(Entry v) {
      linear += v.x * v.a - positive(v.a);
      product.add(expf(-fabsf(v.a)));
    }
    __device__ float total() const { return linear - product.log(); }
  };

  __device__ static Gradients gradients(Entry v, float g) {
    const float e = expf(-fabsf(v.a)), tail = e / (1.f + e);
    return {g * v.a, g * (v.a > 0.f ? (v.x - 1.f) + tail : v.x - tail), 0.f};
  }
};

struct Gaussian {
  struct Sum {
    float sum = 0.f;

    __device__ void add(Entry v) {
      const float t = (v.x - v.a) * expf(-0.5f * v.b);
      sum += t * t + (v.b + 1.8378770664f);
    }
    __device__ float total() const { return -0.5f * sum; }
  };

  __device__ static Gradients gradients(Entry v, float g) {
    const float inverse = expf(-0.5f * v.b), t = (v.x - v.a) * inverse, dmean = g * (t * inverse);
    return {-dmean, dmean, g * (0.5f * t * t - 0.5f)};
  }
};

struct DiscretizedLogistic {
  static constexpr float half_bin = 1.f / 255.f, edge = 1.f - half_bin;

  struct Sum {
    float sum = 0.f;
    LogProduct lower, upper;

    __device__ void add(Entry v) {
      const float inverse = expf(-v.b), w = 2.f * half_bin * inverse;
      const float plus = inverse * (v.x - v.a + half_bin), minus = inverse * (v.x - v.a - half_bin);
      const bool below = v.x < -edge, above = v.x > edge;
      if (!above) sum -= positive(-plus), upper.add(expf(-fabsf(plus)));
      if (!below) sum -= positive(minus), lower.add(expf(-fabsf(minus)));
      if (!above && !below) sum += w < 1e-3f ? -4.8481163646f - v.b - 0.5f * w : logf(-expm1f(-w));
    }
    __device__ float total() const { return sum - upper.log() - lower.log(); }
  };

  __device__ static Gradients gradients(Entry v, float g) {
    const float inverse = expf(-v.b), w = 2.f * half_bin * inverse;
    const float plus = inverse * (v.x - v.a + half_bin), minus = inverse * (v.x - v.a - half_bin);
    const bool below = v.x < -edge, above = v.x > edge;
    const float upper = above ? 0.f : sigmoid(-plus), lower = below ? 0.f : sigmoid(minus);
    const float width = below || above ? 0.f : w < 1e-3f ? 1.f - 0.5f * w : w < 80.f ? w / expm1f(w) : 0.f;
    return {0.f, g * (inverse * (lower - upper)), g * (minus * lower - plus * upper - width)};
  }
};

struct NegativeBinomial {
  struct Sum {
    float sum = 0.f;

    __device__ void add(Entry v) {
      const float r = expf(v.b), u = (v.x - v.a) / (v.a + r), ratio = normal((v.x + r) / (v.a + r));
      sum += r * log_minus_excess(ratio, u);
      if (!(v.x > 0.f)) {
        sum += r * u;
        return;
      }
      sum += v.x * log_minus_excess(v.a / v.x * ratio, -r * u / v.x);
      sum += log_gamma_remainder(v.x + r) - log_gamma_remainder(r) - log_gamma_remainder(v.x) -
             0.5f * (1.8378770664f - fminf(v.b, 0.f));
      sum -= 0.5f * logf(v.x * (fminf(r, 1.f) + v.x / fmaxf(r, 1.f)));  // x²/r may overflow
    }
    __device__ float total() const { return sum; }
  };

  __device__ static Gradients gradients(Entry v, float g) {
    const float r = expf(v.b), u = (v.x - v.a) / (v.a + r), sum = v.x + r;
    const float common = r * log_minus_excess(normal(sum / (v.a + r)), u);
    if (!(v.x > 0.f)) return {0.f, g * (-r / (v.a + r)), g * common};
    return {0.f, g * (r * u / v.a),
            g * (common + 0.5f * v.x / sum + r * (digamma_remainder(r) - digamma_remainder(sum)))};
  }

 private:
  // (x + r) / (μ + r) underflows at x = 0 and r ≪ μ, where r log of it still vanishes.
  __device__ static float normal(float ratio) { return fmaxf(ratio, 1.17549435e-38f); }

  // log(ratio) − excess with ratio = 1 + excess; near 1 by the series of 2 atanh(s) − 2 s, s = u / (2 + u), u − 2 s = u s.
  __device__ static float log_minus_excess(float ratio, float excess) {
    if (!(fabsf(excess) < 0.28f)) return logf(ratio) - excess;
    const float s = excess / (excess + 2.f), w = s * s;
    return s * (w * (((0.23331613838672638f * w + 0.28550779819488525f) * w + 0.4000012278556824f) * w +
                     0.6666666865348816f) - excess);
  }

  // Δ(z) and κ(z), as in csrc/cpu/special.inl.
  __device__ static float log_gamma_remainder(float z) {
    const float t = 1.f / (z < 1.f ? z + 1.f : z), y = 2.f * t - 1.f;
    float p = 2.222171e-06f * y - 6.8441577e-06f;
    p = p * y - 1.0825335e-06f;
    p = p * y + 0.00010094114f;
    p = p * y - 0.00048512753f;
    p = p * y - 0.0012300297f;
    p = t * (p * y + 0.082681395f);
    return z < 1.f ? p + ((z + 0.5f) * log1pf(1.f / z) - 1.f) : p;
  }

  __device__ static float digamma_remainder(float z) {
    const float t = 1.f / (z < 1.f ? z + 1.f : z), y = 2.f * t - 1.f;
    float p = -9.868546e-07f * y - 2.2599133e-06f;
    p = p * y + 1.5650952e-05f;
    p = p * y - 2.4813664e-05f;
    p = p * y - 3.8553582e-05f;
    p = p * y + 0.00039850007f;
    p = p * y - 0.0011529917f;
    p = p * y - 0.0034302648f;
    p = t * t * (p * y + 0.08145138f);
    return z < 1.f ? p + 0.5f * (1.f / z + t) - log1pf(1.f / z) : p;
  }
};

}  // namespace latent_engine::likelihood
