// Launches of the MMD kernels: splits and workspaces. Everything is on raw pointers; `workspace(count)` gives that many
// floats, which live until the stream has run.
#pragma once

#include "launch.cuh"
#include "mmd_kernels.cuh"

namespace latent_engine::mmd {

// One launch of `pairs`.
struct Section {
  Points rows, others;
  bool same;
  double weight;
  float* grads;  // [splits, N, D], or null
  int64_t tiles, splits, tiles_each;

  Section(const Points& rows_, const Points& others_, bool same_, double weight_)
      : rows(rows_), others(others_), same(same_), weight(weight_), grads(nullptr), tiles(0), splits(0), tiles_each(0) {
    if (weight == 0 || rows.count == 0 || others.count == 0) return;
    tiles = tiles_of(rows.count, TILE);
    const Split split(tiles_of(others.count, TILE), tiles);
    splits = split.count, tiles_each = split.tiles_each;
  }
  int64_t blocks() const { return tiles * splits; }

  void run(const Profile& profile, int64_t D, double* sums, cudaStream_t stream) const {
    if (splits)
      launch(pairs, grid(tiles, splits), SHARED_FLOATS, stream, profile, rows, others, D, same, tiles_each, weight,
             static_cast<float>((same ? -4 : -2) * weight), sums, grads);
  }
};

// The gradient of one sample from its own section and that against the other.
template <class Workspace>
float* prepare_grads(Section& own, Section& cross, int64_t size, Workspace& workspace) {
  float* const parts = workspace((own.splits + cross.splits) * size);
  own.grads = parts, cross.grads = parts + own.splits * size;
  return parts;
}

// The value, and the gradients [N, D] and [M, D] unless null.
template <class Workspace>
void forward(const Profile& profile, const Points& x, const Points& y, int64_t D, const MmdWeights& weights, float* value,
             float* grad_x, float* grad_y, Workspace& workspace, cudaStream_t stream) {
  Section xx(x, x, true, weights.xx), yy(y, y, true, weights.yy), xy(x, y, false, weights.xy), yx(y, x, false, weights.xy);
  float* const parts_x = grad_x ? prepare_grads(xx, xy, x.count * D, workspace) : nullptr;
  float* const parts_y = grad_y ? prepare_grads(yy, yx, y.count * D, workspace) : nullptr;
  const int64_t counted = xx.blocks() + yy.blocks() + xy.blocks();
  auto* const sums = reinterpret_cast<double*>(workspace(2 * (counted + yx.blocks()) + 2));
  xx.run(profile, D, sums, stream);
  yy.run(profile, D, sums + xx.blocks(), stream);
  xy.run(profile, D, sums + xx.blocks() + yy.blocks(), stream);
  if (grad_y) yx.run(profile, D, sums + counted, stream);
  launch(add_sums, grid(1), 2 * THREADS, stream, sums, counted, weights.constant, value);
  if (grad_x && x.count)
    launch(add_grads, grid(tiles_of(x.count * D, THREADS)), 0, stream, parts_x, xx.splits + xy.splits, x.count * D, grad_x);
  if (grad_y && y.count)
    launch(add_grads, grid(tiles_of(y.count * D, THREADS)), 0, stream, parts_y, yy.splits + yx.splits, y.count * D, grad_y);
}

// k(x, y), [N, M].
inline void matrix(const Profile& profile, const Points& x, const Points& y, int64_t D, float* out, cudaStream_t stream) {
  if (x.count && y.count)
    launch(matrix_tiles, grid(tiles_of(x.count, TILE), tiles_of(y.count, TILE)), SHARED_FLOATS, stream, profile, x, y, D, out);
}

}  // namespace latent_engine::mmd
