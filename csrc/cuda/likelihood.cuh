// Kernels of the likelihoods; notation and formulas are in kernels/likelihood.py.
#pragma once

#include "launch.cuh"
#include "likelihood_families.cuh"

namespace latent_engine::likelihood {

constexpr int ROWS = 64;  // rows whose gradients are summed in a register before they join the float64 sum

// Arguments [S, N, P]; those along which one is broadcast have stride 0. x and a lie densely along p.
struct Problem {
  const float* x;
  const void* a;
  Scalar a_type;
  const float* b;    // null if the likelihood has one parameter
  const bool* mask;  // null if every entry counts
  int64_t S, N, P;
  int64_t x_strides[2], a_strides[2], b_strides[3], mask_strides[3];

  __device__ bool observed(int64_t s, int64_t n, int64_t p) const {
    return !mask || mask[s * mask_strides[0] + n * mask_strides[1] + p * mask_strides[2]];
  }
  __device__ Entry entry(int64_t s, int64_t n, int64_t p) const {
    return {x[s * x_strides[0] + n * x_strides[1] + p], load(a, a_type, s * a_strides[0] + n * a_strides[1] + p),
            b ? b[s * b_strides[0] + n * b_strides[1] + p * b_strides[2]] : 0.f};
  }
};

// Over the block, in a fixed order; the result is thread 0's.
__device__ inline float block_sum(float value) {
  for (int w = 1; w < 32; w *= 2) value += from_lane_xor(value, w);
  float* const warps = shared_memory();
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < THREADS / 32; ++i) sum += warps[i];
  return sum;
}

// A block a row.
template <class L>
__global__ void __launch_bounds__(THREADS) forward_rows(Problem problem, float* log_prob) {
  const int64_t row = blockIdx.x, s = row / problem.N, n = row % problem.N;
  typename L::Sum sum;
  for (int64_t p = threadIdx.x; p < problem.P; p += THREADS)
    if (problem.observed(s, n, p)) sum.add(problem.entry(s, n, p));
  const float total = block_sum(sum.total());
  if (threadIdx.x == 0) log_prob[row] = total;
}

// What becomes of the gradient of an argument: an entry for each of S · N · P, or sums over the rows of a block and, if the
// argument has one value for all features, over its features: `parts`[chunk][P or feature blocks].
struct Target {
  void* full;
  float* parts;
  int64_t width;  // of a chunk in `parts`
  bool per_p;
  Scalar type;

  __device__ void finish(float sum, int64_t chunk, int64_t p) const {
    if (!parts) return;
    if (per_p) {
      if (p < width) parts[chunk * width + p] = sum;
      return;
    }
    const float total = block_sum(sum);
    if (threadIdx.x == 0) parts[chunk * width + blockIdx.y] = total;
  }
};

struct Chunks {
  int64_t s_rows, n_rows, s_count, n_count;
};

// Blocks: chunks of rows × blocks of features, a feature a thread.
template <class L>
__global__ void __launch_bounds__(THREADS) backward_chunks(Problem problem, Chunks chunks, const float* grad, Target dx,
                                                           Target da, Target db) {
  const int64_t chunk = blockIdx.x, p = static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x;
  const int64_t s0 = chunk / chunks.n_count * chunks.s_rows, n0 = chunk % chunks.n_count * chunks.n_rows;
  Gradients sums{0.f, 0.f, 0.f};
  for (int64_t s = s0; s < problem.S && s < s0 + chunks.s_rows; ++s)
    for (int64_t n = n0; n < problem.N && n < n0 + chunks.n_rows; ++n) {
      if (p >= problem.P) continue;
      const int64_t row = s * problem.N + n, at = row * problem.P + p;
      Gradients d{0.f, 0.f, 0.f};
      if (problem.observed(s, n, p)) d = L::gradients(problem.entry(s, n, p), grad[row]);
      if (dx.full) store(dx.full, dx.type, at, d.x);
      if (da.full) store(da.full, da.type, at, d.a);
      if (db.full) store(db.full, db.type, at, d.b);
      sums.x += d.x, sums.a += d.a, sums.b += d.b;
    }
  dx.finish(sums.x, chunk, p);
  da.finish(sums.a, chunk, p);
  db.finish(sums.b, chunk, p);
}

// The sizes of the parts of a summed argument and of the argument itself: [s, n, p].
struct Parts {
  int64_t sizes[3], out_sizes[3];
};

// out = sums of the parts over the axes of size 1, in float64; a warp a value.
__global__ void merge_parts(const float* parts, Parts p, void* out, Scalar type) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
  const int64_t count = p.out_sizes[0] * p.out_sizes[1] * p.out_sizes[2];
  int64_t first[3] = {i / p.out_sizes[2] / p.out_sizes[1], i / p.out_sizes[2] % p.out_sizes[1], i % p.out_sizes[2]}, steps[3];
  for (int k = 0; k < 3; ++k) steps[k] = p.out_sizes[k] == p.sizes[k] ? 1 : p.sizes[k];
  double sum = 0.0;
  if (i < count)
    for (int64_t j = threadIdx.x % 32; j < steps[0] * steps[1] * steps[2]; j += 32) {
      const int64_t s = first[0] + j / steps[2] / steps[1], n = first[1] + j / steps[2] % steps[1], q = first[2] + j % steps[2];
      sum += parts[(s * p.sizes[1] + n) * p.sizes[2] + q];
    }
  for (int w = 1; w < 32; w *= 2) sum += from_lane_xor(sum, w);
  if (i < count && threadIdx.x % 32 == 0) store(out, type, i, static_cast<float>(sum));
}

template <class F>
void with_likelihood(int64_t kind, const F& f) {
  if (kind == 0) f(Bernoulli{});
  else if (kind == 1) f(Gaussian{});
  else if (kind == 2) f(DiscretizedLogistic{});
  else f(NegativeBinomial{});
}

inline void forward(const Problem& p, int64_t kind, float* log_prob, cudaStream_t stream) {
  if (p.S * p.N == 0) return;
  with_likelihood(kind, [&](auto l) {
    launch(forward_rows<decltype(l)>, grid(p.S * p.N), THREADS / 32, stream, p, log_prob);
  });
}

// The gradient of an argument of the given sizes; null if not needed.
struct Output {
  void* data;
  Scalar type;
  int64_t sizes[3];

  bool is_full(const Problem& p) const { return sizes[0] == p.S && sizes[1] == p.N && sizes[2] == p.P; }
};

// `workspace(count)` gives floats that live until the stream is done with them.
template <class Workspace>
void backward(const Problem& p, int64_t kind, const float* grad, const Output (&outputs)[3], Workspace& workspace,
              cudaStream_t stream) {
  // Rows go together in a block where no summed gradient has an entry for each of them.
  Chunks chunks{ROWS, p.N < ROWS ? p.N : ROWS, 0, 0};
  for (const Output& o : outputs)
    if (o.data && !o.is_full(p) && o.sizes[1] == p.N) chunks.n_rows = 1;
  if (chunks.n_rows > 0) chunks.s_rows = ROWS / chunks.n_rows;
  for (const Output& o : outputs)
    if (o.data && !o.is_full(p) && o.sizes[0] == p.S) chunks.s_rows = 1;
  chunks.s_count = tiles_of(p.S, chunks.s_rows), chunks.n_count = chunks.n_rows ? tiles_of(p.N, chunks.n_rows) : 0;
  const int64_t blocks = tiles_of(p.P, THREADS);
  Target targets[3] = {};
  for (int k = 0; k < 3; ++k) {
    const Output& o = outputs[k];
    if (!o.data) continue;
    const bool per_p = o.sizes[2] == p.P;
    targets[k] = {o.is_full(p) ? o.data : nullptr, nullptr, per_p ? p.P : blocks, per_p, o.type};
    if (!o.is_full(p)) targets[k].parts = workspace(chunks.s_count * chunks.n_count * targets[k].width);
  }
  if (chunks.s_count * chunks.n_count * blocks > 0)
    with_likelihood(kind, [&](auto l) {
      launch(backward_chunks<decltype(l)>, grid(chunks.s_count * chunks.n_count, blocks), THREADS / 32, stream, p, chunks, grad,
             targets[0], targets[1], targets[2]);
    });
  for (int k = 0; k < 3; ++k) {
    const int64_t(&sizes)[3] = outputs[k].sizes;
    const int64_t count = sizes[0] * sizes[1] * sizes[2];
    if (!outputs[k].data || outputs[k].is_full(p) || count == 0) continue;
    const Parts parts{{chunks.s_count, chunks.n_count, targets[k].width}, {sizes[0], sizes[1], sizes[2]}};
    launch(merge_parts, grid(tiles_of(count, THREADS / 32)), 0, stream, targets[k].parts, parts, outputs[k].data,
           outputs[k].type);
  }
}

}  // namespace latent_engine::likelihood
