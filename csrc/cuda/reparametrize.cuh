// Reparametrised samples and their KL divergence on CUDA; the maths is in kernels/reparametrize.py. A thread has one element: all
// its samples, or every lanes-th, of which the sums of a block are added in fixed order.
#pragma once

#include "launch.cuh"

namespace latent_engine::reparametrize {

// [N, D], or [S, N, D].
struct Array {
  const float* data;  // null if there is none
  int64_t stride_s, stride_n, stride_d;

  __device__ float at(int64_t s, int64_t n, int64_t d) const { return data[s * stride_s + n * stride_n + d * stride_d]; }
};

struct Inputs {
  int64_t S, N, D;
  const void* mean;
  Scalar type;
  int64_t mean_stride_n, mean_stride_d;
  Array log_var, noise;
  int width, lanes;  // threads next to one another in a row, a power of two, and those that share an element's samples

  Inputs(int64_t S_, int64_t N_, int64_t D_) : S(S_), N(N_), D(D_), width(1) {
    while (width < D && width < (S > 1 ? 32 : THREADS)) width *= 2;
    lanes = S > 1 ? THREADS / width : 1;
  }
  int rows() const { return THREADS / (width * lanes); }  // of a block
  dim3 blocks() const { return grid(tiles_of(N, rows()) * tiles_of(D, width)); }

  __device__ float mean_at(int64_t n, int64_t d) const { return load(mean, type, n * mean_stride_n + d * mean_stride_d); }
};

// What a thread works on.
struct Place {
  int64_t n, d;
  int lane;
  bool inside;

  __device__ explicit Place(const Inputs& in) {
    const unsigned columns = static_cast<unsigned>(tiles_of(in.D, in.width));
    const int slot = threadIdx.x / in.width;
    n = static_cast<int64_t>(blockIdx.x / columns) * (THREADS / (in.width * in.lanes)) + slot / in.lanes;
    d = static_cast<int64_t>(blockIdx.x % columns) * in.width + threadIdx.x % in.width;
    lane = slot % in.lanes;
    inside = n < in.N && d < in.D;
  }
};

// Of v = log σ², with h = v / 2: σ = e^h, u = e^h − 1 and u − h, of which the last is a polynomial near 0, that of csrc/cpu.
struct Scale {
  float std, u, u_minus_h;

  __device__ explicit Scale(float log_var) {
    const float h = 0.5f * log_var;
    const float p = fmaf(fmaf(fmaf(fmaf(0.0013863756321370602f, h, 0.008367509581148624f), h, 0.041667237877845764f), h,
                              0.16666534543037415f), h, 0.5f);
    std = expf(h), u = expm1f(h);
    u_minus_h = fabsf(h) < 0.34657f ? p * h * h : u - h;
  }
  __device__ float expm1() const { return u * (u + 2.f); }
  __device__ float expm1_minus_log_var() const { return fmaf(u, u, 2.f * u_minus_h); }
};

__global__ void __launch_bounds__(THREADS) forward(Inputs in, float* z, float* kl) {
  const Place at(in);
  if (!at.inside) return;
  const float mean = in.mean_at(at.n, at.d);
  const Scale scale(in.log_var.at(0, at.n, at.d));
  for (int64_t s = at.lane; s < in.S; s += in.lanes)
    z[(s * in.N + at.n) * in.D + at.d] = fmaf(scale.std, in.noise.at(s, at.n, at.d), mean);
  if (at.lane == 0) kl[at.n * in.D + at.d] = 0.5f * fmaf(mean, mean, scale.expm1_minus_log_var());
}

struct Gradients {
  Array grad_z, grad_kl;
  void* dmean;      // [N, D] of the type of mean, or null
  float* dlog_var;  // [N, D] or null
};

__global__ void __launch_bounds__(THREADS) backward(Inputs in, Gradients p) {
  const Place at(in);
  float of_mean = 0.f, of_std = 0.f;
  if (p.grad_z.data && at.inside)
    for (int64_t s = at.lane; s < in.S; s += in.lanes) {
      const float g = p.grad_z.at(s, at.n, at.d);
      of_mean += g;
      if (p.dlog_var) of_std = fmaf(g, in.noise.at(s, at.n, at.d), of_std);
    }
  if (p.grad_z.data && in.lanes > 1) {
    float *const means = shared_memory(), *const stds = means + THREADS;
    means[threadIdx.x] = of_mean, stds[threadIdx.x] = of_std;
    __syncthreads();
    for (int i = 1; i < in.lanes && at.lane == 0; ++i) {
      of_mean += means[threadIdx.x + i * in.width];
      of_std += stds[threadIdx.x + i * in.width];
    }
  }
  if (!at.inside || at.lane > 0) return;
  const float k = p.grad_kl.data ? p.grad_kl.at(0, at.n, at.d) : 0.f;
  const int64_t i = at.n * in.D + at.d;
  if (p.dmean) store(p.dmean, in.type, i, p.grad_kl.data ? fmaf(k, in.mean_at(at.n, at.d), of_mean) : of_mean);
  if (!p.dlog_var) return;
  const Scale scale(in.log_var.at(0, at.n, at.d));
  const float value = scale.std * of_std;
  p.dlog_var[i] = 0.5f * (p.grad_kl.data ? fmaf(k, scale.expm1(), value) : value);
}

inline void run_forward(const Inputs& in, float* z, float* kl, cudaStream_t stream) {
  if (in.N && in.D) launch(forward, in.blocks(), 0, stream, in, z, kl);
}

inline void run_backward(const Inputs& in, const Gradients& p, cudaStream_t stream) {
  if (in.N && in.D) launch(backward, in.blocks(), 2 * THREADS, stream, in, p);
}

}  // namespace latent_engine::reparametrize
