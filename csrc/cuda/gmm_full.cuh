// Launches of the kernels of Gaussian mixtures with full covariances: splits and workspaces. Everything is on raw pointers;
// `workspace(count)` gives that many floats, which live until the stream has run.
#pragma once

#include "gmm_full_kernels.cuh"
#include "launch.cuh"

namespace latent_engine::gmm_full {

template <int TILES>
struct Tiles {
  static constexpr int count = TILES;
};

// Calls `run` with the number of 4 × 4 tiles that each of THREADS threads has of `tiles`.
template <class Run>
void with_tiles(int64_t tiles, Run run) {
  if (tiles <= THREADS) run(Tiles<1>());
  else if (tiles <= 2 * THREADS) run(Tiles<2>());
  else run(Tiles<5>());
}

// Fills `constants` of the problem.
template <class Workspace>
void prepare_mixture(Problem& p, const float* log_weights, Workspace& workspace, cudaStream_t stream) {
  if (p.K == 0) return;
  float* const constants = workspace(p.K);
  launch(prepare, grid(tiles_of(p.K, THREADS)), 0, stream, p.chol, log_weights, p.K, p.D, constants);
  p.constants = constants;
}

// log_prob [N], and responsibilities [N, K] unless null.
template <class Workspace>
void forward(const Problem& p, float* log_prob, float* responsibilities, Workspace& workspace, cudaStream_t stream) {
  if (p.N == 0) return;
  const int64_t row_tiles = tiles_of(p.N, ROWS);
  const Split split(p.K, row_tiles);
  auto* parts = split.count > 1 ? reinterpret_cast<LogSum*>(workspace(2 * split.count * p.N)) : nullptr;
  launch(forward_tiles, grid(row_tiles, split.count), p.shared_floats(), stream, p, split.tiles_each, responsibilities,
         log_prob, parts);
  if (parts) launch(gmm::merge_log_sums, grid(tiles_of(p.N, THREADS)), 0, stream, parts, split.count, p.N, log_prob);
  if (responsibilities && p.K > 0)
    launch(gmm::normalise, grid(tiles_of(p.N * p.K, THREADS)), 0, stream, responsibilities, log_prob, p.N, p.K);
}

// grad_z [N, D] in the type of z.
template <class Workspace>
void backward_z(const Problem& p, const Upstream& up, void* grad_z, Workspace& workspace, cudaStream_t stream) {
  if (p.N * p.D == 0) return;
  const int64_t row_tiles = tiles_of(p.N, ROWS);
  const Split split(p.K, row_tiles);
  float* parts = split.count > 1 ? workspace(split.count * p.N * p.D) : nullptr;
  with_tiles(ROWS / 4 * (p.whole() / 4), [&](auto tiles) {
    constexpr int count = decltype(tiles)::count > 2 ? 4 : decltype(tiles)::count;
    launch(gradient_rows<count>, grid(row_tiles, split.count), p.shared_floats(), stream, p, up, split.tiles_each, grad_z,
           parts);
  });
  if (parts)
    launch(gmm::merge_rows, grid(tiles_of(p.N * p.D, THREADS)), 0, stream, parts, split.count, p.N * p.D, grad_z, p.z_type);
}

// The moments [K], [K, D] and [K, D, D]. With no rows nothing is written: pass zeros.
template <class Workspace>
void moments(const Problem& p, const Upstream& up, const Sums& out, Workspace& workspace, cudaStream_t stream) {
  if (p.N * p.K == 0) return;
  const Split split(tiles_of(p.N, ROWS), p.K);
  const auto doubles = [&](int64_t count) { return reinterpret_cast<double*>(workspace(2 * split.count * count)); };
  const Sums parts{doubles(p.K), doubles(p.K * p.D), doubles(p.K * p.D * p.D)};
  const int64_t across = p.whole() / 4;
  with_tiles(across * (across + 1) / 2, [&](auto tiles) {
    launch(component_sums<decltype(tiles)::count>, grid(p.K, split.count), p.shared_floats(), stream, p, up, split.tiles_each,
           parts);
  });
  launch(merge_sums, grid(tiles_of(p.K * (p.D > 0 ? p.D * p.D : 1), THREADS)), 0, stream, parts, split.count, p.K, p.D, out);
}

}  // namespace latent_engine::gmm_full
