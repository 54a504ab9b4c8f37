// mmd_fwd and mmd_kernel on CPU tensors: allocation, the schedule of tasks, launch. Arguments are checked in kernels/mmd.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "tournament.h"

namespace latent_engine {
namespace {

using Floats = std::vector<double>;

constexpr int64_t kPairWork = 40;   // multiplications of a kernel's value and slope
constexpr int64_t kMostGroups = 32;
constexpr int64_t kFewBlocks = 8, kFewDimensions = 128;  // of small samples

// Blocks a group, for tasks of at least kTaskWork multiplications, but no fewer than four groups.
int64_t blocks_of_group(int64_t blocks, int64_t work) {
  const int64_t tile = kMmdBlock * kMmdBlock * work;
  const auto side = static_cast<int64_t>(std::ceil(std::sqrt(static_cast<double>(kTaskWork) / static_cast<double>(tile))));
  return std::max({std::min(side, blocks / 4), ceil_div(blocks, kMostGroups), int64_t(1)});
}

// Copies of small samples, a task each, and one where the whole is not worth two; none of others, which meet in groups.
int64_t copies_of(int64_t blocks, int64_t D, int64_t work) {
  if (blocks > kFewBlocks || D > kFewDimensions) return 0;
  return blocks * blocks / 2 * kMmdBlock * kMmdBlock * work < kTaskWork ? 1 : 2;
}

template <class T>
MmdPoints<T> points(const Tensor& t, const Tensor* grad) {
  return {t.size(0), t.const_data_ptr<T>(), {t.stride(0), t.stride(1)}, grad ? grad->mutable_data_ptr<T>() : nullptr};
}

template <class T>
MmdProblem<T> problem(int64_t kernel, const Floats& scales, double unit, const MmdPoints<T>& x, const MmdPoints<T>& y,
                      int64_t D, const MmdWeights& weights, int64_t group, int64_t copies, T* constants) {
  MmdProblem<T> p{{}, x, y, D, weights, group, copies, nullptr, nullptr};
  p.profile.kernel = static_cast<MmdKernel>(kernel);
  p.profile.scales = static_cast<int64_t>(scales.size());
  kernels<T>().mmd.pack_profile(p.profile, scales.data(), unit, constants);
  return p;
}

template <class T>
void load(const MmdProblem<T>& p) {
  in_parts(p.block_count(), kMmdBlock * p.D * 4, [&](int64_t first, int64_t last) { kernels<T>().mmd.load(p, first, last); });
}

// A share of the tiles for each copy: nothing that one core writes is read by another, which at this size would take longer
// than to compute it.
template <class T>
double sum_of_copies(const MmdProblem<T>& p) {
  const int64_t blocks = p.block_count(), tiles = blocks * (blocks + 1) / 2;
  std::vector<double> sums(p.copies, 0.0);
  for_each_task(p.copies, [&](int64_t i) {
    const MmdProblem<T> copy = p.copy(i);
    kernels<T>().mmd.load(copy, 0, blocks);
    double sum = 0;
    for (int64_t b = 0, tile = 0; b < blocks; ++b)
      for (int64_t c = b; c < blocks; ++c, ++tile)
        if (tile * p.copies / tiles == i) sum += kernels<T>().mmd.pairs(copy, b, c);
    sums[i] = sum;
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

template <class T>
double sum_of_groups(const MmdProblem<T>& p) {
  load(p);
  const int64_t groups = p.groups();
  return sum_of_games(groups, p.grads, [&](int64_t a, int64_t b, bool first, bool) {
    double sum = b < groups ? kernels<T>().mmd.pairs(p, a, b) : 0;
    for (const int64_t group : {a, b})
      if (first && group < groups) sum += kernels<T>().mmd.pairs(p, group, group);
    return sum;
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& y, int64_t kernel, const Floats& scales, double unit,
                                           int64_t estimator, const Floats& sections, bool need_x, bool need_y) {
  const int64_t N = x.size(0), M = y.size(0), D = x.size(1), S = static_cast<int64_t>(scales.size());
  Tensor value = empty(x, {}), grad_x = empty(x, {need_x ? N : 0, need_x ? D : 0});
  Tensor grad_y = empty(x, {need_y ? M : 0, need_y ? D : 0});
  const auto px = points<T>(x, need_x ? &grad_x : nullptr), py = points<T>(y, need_y ? &grad_y : nullptr);
  const bool need = need_x || need_y;
  const int64_t blocks = px.blocks() + py.blocks(), work = (need ? 3 : 1) * D + kPairWork;
  const int64_t copies = copies_of(blocks, D, work), group = copies ? 1 : blocks_of_group(blocks, work);
  const int64_t size = std::max<int64_t>(copies, 1) * blocks * D * kMmdBlock, constants = MmdProfile<T>::size(S);
  const MmdWeights weights(static_cast<MmdKernel>(kernel), scales, static_cast<MmdEstimator>(estimator), sections, N, M);
  Arena<T> arena(Scratch::launch, constants, size, need ? size : 0);
  MmdProblem<T> p = problem<T>(kernel, scales, unit, px, py, D, weights, group, copies, arena.take(constants));
  p.blocks = arena.take(size);
  if (need) p.grads = arena.take(size);
  const double total = weights.constant + (copies ? sum_of_copies(p) : sum_of_groups(p));
  if (need)
    in_parts(blocks, kMmdBlock * D * 4, [&](int64_t first, int64_t last) { kernels<T>().mmd.store_grads(p, first, last); });
  *value.mutable_data_ptr<T>() = static_cast<T>(total);
  return {value, grad_x, grad_y};
}

template <class T>
Tensor matrix(const Tensor& x, const Tensor& y, int64_t kernel, const Floats& scales, double unit) {
  const int64_t D = x.size(1), constants = MmdProfile<T>::size(static_cast<int64_t>(scales.size()));
  Tensor out = empty(x, {x.size(0), y.size(0)});
  const auto px = points<T>(x, nullptr), py = points<T>(y, nullptr);
  const int64_t blocks = px.blocks() + py.blocks(), size = blocks * D * kMmdBlock;
  const MmdWeights none(static_cast<MmdKernel>(kernel), scales, MmdEstimator::sum, {0, 0, 0}, 0, 0);
  Arena<T> arena(Scratch::launch, constants, size);
  MmdProblem<T> p = problem<T>(kernel, scales, unit, px, py, D, none, 1, 1, arena.take(constants));
  p.blocks = arena.take(size);
  load(p);
  in_parts(px.blocks(), kMmdBlock * y.size(0) * (D + kPairWork), [&](int64_t first, int64_t last) {
    kernels<T>().mmd.matrix(p, out.mutable_data_ptr<T>(), first, last);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> mmd_fwd(const Tensor& x, const Tensor& y, int64_t kernel, Floats scales, double unit,
                                           int64_t estimator, Floats sections, bool need_x, bool need_y) {
  const auto f = x.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return f(x, y, kernel, scales, unit, estimator, sections, need_x, need_y);
}

Tensor mmd_kernel(const Tensor& x, const Tensor& y, int64_t kernel, Floats scales, double unit) {
  return (x.scalar_type() == ScalarType::Double ? matrix<double> : matrix<float>)(x, y, kernel, scales, unit);
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) {
  m.impl("mmd_fwd", TORCH_BOX(&mmd_fwd));
  m.impl("mmd_kernel", TORCH_BOX(&mmd_kernel));
}

}  // namespace
}  // namespace latent_engine
