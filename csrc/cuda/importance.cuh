// Launches of the importance kernels: splits and workspaces. Everything is on raw pointers; `workspace(count)` gives that many
// floats, which live until the stream has run.
#pragma once

#include "importance_kernels.cuh"

namespace latent_engine::importance {

constexpr int64_t LEAST_SAMPLES = 16;  // of a thread, before the samples of a data point are split

struct Bound {
  int64_t groups;
  Order order;
  float elbo_weight;
};

// Fills `inv_vars` and `constants`.
template <class Workspace>
void prepare_posterior(Samples& p, const float* log_var, int64_t stride_n, int64_t stride_d, Workspace& workspace,
                       cudaStream_t stream) {
  float *inv_vars = workspace(p.N * p.D), *constants = workspace(p.N);
  if (p.N > 0)
    launch(prepare, grid(tiles_of(p.N, THREADS / 32)), 0, stream, log_var, stride_n, stride_d, p.normal_prior, p.N, p.D,
           inv_vars, constants);
  p.inv_vars = inv_vars, p.constants = constants;
}

inline void all_log_weights(const Samples& p, const float* log_px, const float* log_pz, float* log_w, cudaStream_t stream) {
  const int64_t rows = p.S * p.N;
  if (rows == 0) return;
  if (p.D <= 8) launch(log_weights<4>, grid(tiles_of(rows, THREADS / 4)), 0, stream, p, log_px, log_pz, log_w);
  else if (p.D <= 64) launch(log_weights<8>, grid(tiles_of(rows, THREADS / 8)), 0, stream, p, log_px, log_pz, log_w);
  else launch(log_weights<32>, grid(tiles_of(rows, THREADS / 32)), 0, stream, p, log_px, log_pz, log_w);
}

// How the reductions divide `groups` groups of `size` samples into parts.
struct Parts {
  Split split;
  int64_t blocks, share, count;  // samples a split, parts a group

  Parts(int64_t groups, int64_t size, int64_t N)
      : split(tiles_of(size, LEAST_SAMPLES * LANES), tiles_of(N, COLUMNS) * groups),
        blocks(tiles_of(N, COLUMNS) * split.count * groups),
        share(split.tiles_each * LEAST_SAMPLES * LANES),
        count(split.count * LANES) {}
};

// Parts of the moments of `groups` groups of `size` samples.
template <class T, class Workspace>
T* moment_parts(const Parts& cut, const float* log_w, int64_t groups, int64_t size, int64_t N, Order order,
                Workspace& workspace, cudaStream_t stream) {
  T* const parts = reinterpret_cast<T*>(workspace(groups * cut.count * MOMENTS * N * (sizeof(T) / sizeof(float))));
  launch(moments<T>, grid(cut.blocks), 0, stream, log_w, size, N, cut.split.count, cut.share, order, parts);
  return parts;
}

// bound [N], and weights [S, N] unless null.
template <class Workspace>
void reduce(const float* log_w, int64_t S, int64_t N, const Bound& b, float* bound, float* out, Workspace& workspace,
            cudaStream_t stream) {
  if (N == 0) return;
  const int64_t size = S / b.groups;
  const Parts cut(b.groups, size, N);
  const bool corrects = !b.order.extreme && b.order.scale < 1.f && b.elbo_weight != 1.f;
  float *tops = workspace(b.groups * N), *factors = workspace(b.groups * N);
  float* const centres = corrects ? workspace(b.groups * N) : nullptr;
  const float* const parts = moment_parts<float>(cut, log_w, b.groups, size, N, b.order, workspace, stream);
  launch(bounds, grid(tiles_of(N, THREADS)), 0, stream, parts, cut.count, b.groups, S, N, b.order, b.elbo_weight, bound, tops,
         factors, centres);
  if (corrects) {
    float* const excess = workspace(b.groups * cut.count * N);
    launch(excesses, grid(cut.blocks), 0, stream, log_w, centres, size, N, cut.split.count, cut.share, b.order, excess);
    launch(correct, grid(tiles_of(N, THREADS)), 0, stream, excess, centres, cut.count, b.groups, S, N, b.order, b.elbo_weight,
           bound);
  }
  if (out)
    launch(weights, grid(tiles_of(S * N, THREADS)), 0, stream, log_w, tops, factors, S, N, size, b.order, b.elbo_weight, out);
}

// Moments [MOMENTS, N] of log_w [S, N] and of `state` together.
template <class Workspace>
void add_moments(const float* log_w, int64_t S, int64_t N, const double* state, double* out, Workspace& workspace,
                 cudaStream_t stream) {
  if (N == 0) return;
  const Parts cut(1, S, N);
  const double* const parts = moment_parts<double>(cut, log_w, 1, S, N, Order{1.f, 1.f, false}, workspace, stream);
  launch(merge_moments, grid(tiles_of(N, THREADS)), 0, stream, parts, cut.count, N, state, out);
}

template <int WIDTH, class Workspace>
void backward_of_width(const Samples& p, const Upstream& up, void* grad_z, float* grad_mu, float* grad_log_var,
                       Workspace& workspace, cudaStream_t stream) {
  constexpr int64_t rows = THREADS / WIDTH;
  const int64_t chunks = p.D > 0 ? tiles_of(p.D, WIDTH) : 1;
  const Split split(tiles_of(p.S, rows * LEAST_SAMPLES), p.N * chunks);
  const int64_t count = split.count * rows;
  Sums sums{};
  if (grad_mu) sums = {workspace(count * p.N * p.D), workspace(count * p.N * p.D), workspace(count * p.N)};
  const int64_t share = split.tiles_each * rows * LEAST_SAMPLES;
  launch(backward<WIDTH>, grid(p.N, split.count, chunks), 0, stream, p, up, share, grad_z, sums);
  if (grad_mu && p.D > 0)
    launch(merge_sums, grid(tiles_of(p.N * p.D, THREADS)), 0, stream, sums, count, p.N, p.D, grad_mu, grad_log_var);
}

// Gradients from those of log w; null ones are not needed, nor are those of mu and log_var without the other.
template <class Workspace>
void backward_samples(const Samples& p, const Upstream& up, void* grad_z, float* grad_mu, float* grad_log_var,
                      Workspace& workspace, cudaStream_t stream) {
  if (p.S * p.N == 0) return;
  if (p.D <= 8) backward_of_width<8>(p, up, grad_z, grad_mu, grad_log_var, workspace, stream);
  else if (p.D <= 32) backward_of_width<32>(p, up, grad_z, grad_mu, grad_log_var, workspace, stream);
  else backward_of_width<64>(p, up, grad_z, grad_mu, grad_log_var, workspace, stream);
}

}  // namespace latent_engine::importance
