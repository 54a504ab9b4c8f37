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

// Parts of the moments of `groups` groups of `size` samples, and their number a group.
template <class T, class Workspace>
int64_t moment_parts(const float* log_w, int64_t groups, int64_t size, int64_t N, Order order, T*& parts, Workspace& workspace,
                     cudaStream_t stream) {
  const int64_t columns = tiles_of(N, COLUMNS), tile = LEAST_SAMPLES * LANES;
  const Split split(tiles_of(size, tile), columns * groups);
  const int64_t count = split.count * LANES;
  parts = reinterpret_cast<T*>(workspace(groups * count * MOMENTS * N * (sizeof(T) / sizeof(float))));
  launch(moments<T>, grid(columns * split.count * groups), 0, stream, log_w, size, N, split.count, split.tiles_each * tile,
         order, parts);
  return count;
}

// bound [N], and weights [S, N] unless null.
template <class Workspace>
void reduce(const float* log_w, int64_t S, int64_t N, const Bound& b, float* bound, float* out, Workspace& workspace,
            cudaStream_t stream) {
  if (N == 0) return;
  const int64_t size = S / b.groups;
  float *parts, *tops = workspace(b.groups * N), *factors = workspace(b.groups * N);
  const int64_t count = moment_parts(log_w, b.groups, size, N, b.order, parts, workspace, stream);
  launch(bounds, grid(tiles_of(N, THREADS)), 0, stream, parts, count, b.groups, S, N, b.order, b.elbo_weight, bound, tops,
         factors);
  if (out)
    launch(weights, grid(tiles_of(S * N, THREADS)), 0, stream, log_w, tops, factors, S, N, size, b.order, b.elbo_weight, out);
}

// Moments [MOMENTS, N] of log_w [S, N] and of `state` together.
template <class Workspace>
void add_moments(const float* log_w, int64_t S, int64_t N, const double* state, double* out, Workspace& workspace,
                 cudaStream_t stream) {
  if (N == 0) return;
  double* parts;
  const int64_t count = moment_parts(log_w, 1, S, N, Order{1.f, 1.f, false}, parts, workspace, stream);
  launch(merge_moments, grid(tiles_of(N, THREADS)), 0, stream, parts, count, N, state, out);
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
