// Launches of the Gaussian-mixture kernels: tile shapes, splits and workspaces. Everything is on raw pointers;
// `workspace(count)` gives that many floats, which live until the stream has run.
#pragma once

#include "gmm_kernels.cuh"
#include "launch.cuh"

namespace latent_engine::gmm {

template <class T>
struct Use {
  using Tile = T;
};

// Calls `run` with the tile for the shape: few components leave a wide tile idle, few dimensions a deep one.
template <class Run>
void with_tile(int64_t K, int64_t D, Run run) {
  if (K <= 16) {
    if (D <= 4) run(Use<Tile<128, 16, 4>>());
    else if (D <= 16) run(Use<Tile<128, 16, 16>>());
    else run(Use<Tile<128, 16, 32>>());
  } else if (D <= 4) run(Use<Tile<64, 64, 4>>());
  else if (D <= 16) run(Use<Tile<64, 64, 16>>());
  else if (D <= 32) run(Use<Tile<64, 64, 32>>());
  else run(Use<Tile<64, 64, 64>>());
}

struct LogVars {
  const float* data;
  int64_t stride_k, stride_d;
};

// Fills `inv_vars` and `constants` of the problem.
template <class Workspace>
void prepare_mixture(Problem& p, LogVars log_vars, const float* log_weights, Workspace& workspace,
                     cudaStream_t stream) {
  if (p.K == 0) return;
  float *inv_vars = workspace(p.K * p.D), *constants = workspace(p.K);
  launch(prepare, grid(tiles_of(p.K, THREADS / 32)), 0, stream, log_vars.data, log_vars.stride_k, log_vars.stride_d,
         log_weights, p.K, p.D, inv_vars, constants);
  p.inv_vars = inv_vars, p.constants = constants;
}

// log_prob [N], and responsibilities [N, K] unless null.
template <class Workspace>
void forward(const Problem& p, float* log_prob, float* responsibilities, Workspace& workspace, cudaStream_t stream) {
  if (p.N == 0) return;
  with_tile(p.K, p.D, [&](auto use) {
    using T = typename decltype(use)::Tile;
    const int64_t row_tiles = tiles_of(p.N, T::N);
    const Split split(tiles_of(p.K, T::K), row_tiles);
    auto* parts = split.count > 1 ? reinterpret_cast<LogSum*>(workspace(2 * split.count * p.N)) : nullptr;
    launch(forward_tiles<T>, grid(row_tiles, split.count), T::FORWARD_FLOATS, stream, p, split.tiles_each,
           responsibilities, log_prob, parts);
    if (parts) launch(merge_log_sums, grid(tiles_of(p.N, THREADS)), 0, stream, parts, split.count, p.N, log_prob);
  });
  if (responsibilities && p.K > 0)
    launch(normalise, grid(tiles_of(p.N * p.K, THREADS)), 0, stream, responsibilities, log_prob, p.N, p.K);
}

// grad_z [N, D] in the type of z.
template <class Workspace>
void backward_z(const Problem& p, const Upstream& up, void* grad_z, Workspace& workspace, cudaStream_t stream) {
  if (p.N * p.D == 0) return;
  with_tile(p.K, p.D, [&](auto use) {
    using T = typename decltype(use)::Tile;
    const int64_t row_tiles = tiles_of(p.N, T::N), chunks = T::chunks(p.D);
    const Split split(tiles_of(p.K, T::K), row_tiles * chunks);
    float* parts = split.count > 1 ? workspace(split.count * p.N * p.D) : nullptr;
    launch(backward_rows<T>, grid(row_tiles, split.count, chunks), T::ROWS_FLOATS, stream, p, up, split.tiles_each,
           grad_z, parts);
    if (parts)
      launch(merge_rows, grid(tiles_of(p.N * p.D, THREADS)), 0, stream, parts, split.count, p.N * p.D, grad_z,
             p.z_type);
  });
}

// grad_means [K, D], grad_log_vars [K, D], grad_log_weights [K]; if `plain`, Σ a δ and Σ a δ² instead of the first two. With no
// rows nothing is written: pass zeros.
template <class Workspace>
void backward_mixture(const Problem& p, const Upstream& up, float* grad_means, float* grad_log_vars,
                      float* grad_log_weights, bool plain, Workspace& workspace, cudaStream_t stream) {
  if (p.N * p.K == 0) return;
  with_tile(p.K, p.D, [&](auto use) {
    using T = typename decltype(use)::Tile;
    const int64_t component_tiles = tiles_of(p.K, T::K), chunks = T::chunks(p.D);
    const Split split(tiles_of(p.N, T::N), component_tiles * chunks);
    const int64_t outputs = split.count * p.K;
    const Moments parts{workspace(outputs), workspace(outputs * p.D), workspace(outputs * p.D)};
    launch(backward_components<T>, grid(component_tiles, split.count, chunks), T::COMPONENTS_FLOATS, stream, p, up,
           split.tiles_each, parts);
    launch(merge_components, grid(tiles_of(p.K * (p.D > 0 ? p.D : 1), THREADS)), 0, stream, parts, split.count,
           plain ? nullptr : p.inv_vars, p.K, p.D, grad_means, grad_log_vars, grad_log_weights);
  });
}

}  // namespace latent_engine::gmm
