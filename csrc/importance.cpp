// importance_fwd, importance_bwd and importance_moments on CPU tensors: allocation, the cut into tasks, launch. Arguments are
// checked in kernels/importance.py and kernels/importance_statistics.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "binding.h"

namespace latent_engine {
namespace {

constexpr int64_t kBlock = 8192;                        // log-weights of a block: its lines stay in the cache
constexpr int64_t kLeastBlock = 4;                      // rows of a block
constexpr int64_t kLeastRows = 12, kMostRows = 256;     // of a chunk of the backward pass
constexpr int64_t kLeastPoints = 16;                    // data points of a task where samples are too few
constexpr int64_t kRead = 4, kWrite = 8;                // of a number of z past the L2 cache, in multiplications
constexpr int64_t kExpWork = 16;
constexpr int64_t kVectors = 64;                        // bytes of a group of lanes

template <class T>
int64_t padded(int64_t n) {
  return round_up(n, kVectors / static_cast<int64_t>(sizeof(T)));
}

// The cut of each group of samples into blocks, each a task's or a part of one.
struct Blocks {
  int64_t groups, size, rows, count;  // samples a group, rows a block, blocks a group

  Blocks(int64_t S, int64_t N, int64_t groups_, int64_t work) : groups(std::max<int64_t>(groups_, 1)), size(S / groups) {
    const int64_t most = std::max<int64_t>(size, 1), tasks = std::max<int64_t>(task_count(S * work) / groups, 1);
    const int64_t parts = round_up(std::max<int64_t>(ceil_div(most * N, kBlock), 1), tasks);
    rows = std::max(ceil_div(most, parts), std::min(most, kLeastBlock));
    count = ceil_div(size, rows);
  }
  // Calls f(block, first row, number of rows) for all blocks of all groups, in parallel.
  template <class F>
  void each(int64_t work, const F& f) const {
    const int64_t all = groups * count, step = ceil_div(all, task_count(all * rows * work));
    for_each_task(ceil_div(all, std::max<int64_t>(step, 1)), [&](int64_t task) {
      for (int64_t block = task * step; block < std::min(all, (task + 1) * step); ++block) {
        const int64_t row = block % count * rows;
        f(block, block / count * size + row, std::min(rows, size - row));
      }
    });
  }
};

template <class T>
ImportanceModel<T> pack(T* memory, const Tensor& mu, const Tensor& log_var, bool normal_prior) {
  const int64_t N = mu.size(0), D = mu.size(1);
  const ImportanceModel<T> model{N,
                                 D,
                                 padded<T>(D),
                                 mu.const_data_ptr<T>(),
                                 log_var.const_data_ptr<T>(),
                                 {mu.stride(0), mu.stride(1)},
                                 {log_var.stride(0), log_var.stride(1)},
                                 normal_prior,
                                 memory,
                                 memory + 2 * N * padded<T>(D)};
  in_parts(N, kExpWork * D, [&](int64_t first, int64_t last) { kernels<T>().importance.pack(model, first, last); });
  return model;
}

template <class T>
int64_t packed_size(const Tensor& mu) {
  return mu.size(0) * (2 * padded<T>(mu.size(1)) + 1);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const std::optional<Tensor>& z_, const std::optional<Tensor>& mu,
                                           const std::optional<Tensor>& log_var, const Tensor& log_px_,
                                           const std::optional<Tensor>& log_pz_, double alpha, double elbo_weight,
                                           int64_t groups, bool need_weights) {
  const auto& k = kernels<T>().importance;
  const int64_t S = log_px_.size(0), N = log_px_.size(1), D = z_ ? z_->size(2) : 0;
  const Tensor log_px = as_contiguous(log_px_);
  const std::optional<Tensor> z = z_ ? std::optional<Tensor>(as_contiguous(*z_)) : std::nullopt;
  const std::optional<Tensor> log_pz = log_pz_ ? std::optional<Tensor>(as_contiguous(*log_pz_)) : std::nullopt;
  need_weights = need_weights && groups > 0;
  const int64_t work = N * ((z ? (3 + kRead) * D : 0) + 24), stride = padded<T>(N), w = need_weights;
  const Blocks blocks(S, N, groups, work);
  const int64_t packed = z ? packed_size<T>(*mu) : 0;
  const int64_t moments = groups ? blocks.groups * blocks.count * kImportanceMoments * stride : 0;
  const T scale = static_cast<T>(std::abs(1 - alpha));
  const bool corrects = groups > 0 && scale < T(1) && elbo_weight != 1;
  const int64_t centres = corrects ? blocks.groups * stride : 0;
  Arena<T> arena(Scratch::launch, packed, moments, centres);
  T* const memory = arena.take(packed);

  Tensor log_w = empty(log_px, {z ? S : 0, z ? N : 0}), bound = empty(log_px, {groups ? N : 0});
  Tensor weights = empty(log_px, {w * S, w * N});
  T* const moments_at = arena.take(moments);
  const ImportanceBound<T> p{N, S, stride, blocks.groups, blocks.count, {alpha > 1 ? T(-1) : T(1), scale},
                             static_cast<T>(elbo_weight), moments_at, corrects ? arena.take(centres) : nullptr,
                             bound.mutable_data_ptr<T>()};
  ImportanceModel<T> model{};
  ImportanceSamples<T> samples{};
  if (z) {
    model = pack(memory, *mu, *log_var, !log_pz);
    samples = {S, z->const_data_ptr<T>(), log_px.const_data_ptr<T>(), log_pz ? log_pz->const_data_ptr<T>() : nullptr,
               log_w.mutable_data_ptr<T>()};
  }
  const T* const x = z ? log_w.const_data_ptr<T>() : log_px.const_data_ptr<T>();
  const auto moments_of = [&](int64_t block) { return p.moments + block * kImportanceMoments * stride; };
  const int64_t parts = std::min(task_count(S * work), ceil_div(N, kLeastPoints));
  const bool by_points = z && parts > blocks.groups * blocks.count;
  if (by_points)
    for_each_task(parts, [&](int64_t part) {
      k.log_weights(model, samples, {0, S}, {part * N / parts, (part + 1) * N / parts});
    });
  blocks.each(by_points ? N * 24 : work, [&](int64_t block, int64_t first, int64_t rows) {
    if (z && !by_points) k.log_weights(model, samples, {first, first + rows}, {0, N});
    if (groups) k.moments(x + first * N, rows, N, p.order, moments_of(block), stride);
  });
  if (!groups) return {bound, log_w, weights};
  for (int64_t g = 0; g < groups; ++g) k.merge(moments_of(g * blocks.count), blocks.count, stride, scale);
  k.bound(p);
  if (corrects) {
    blocks.each(N * 12, [&](int64_t block, int64_t first, int64_t rows) {
      k.excess(p, p.centres + block / blocks.count * stride, x + first * N, rows, moments_of(block));
    });
    k.correct(p);
  }
  if (need_weights)
    blocks.each(N * 12, [&](int64_t block, int64_t first, int64_t rows) {
      k.weights(p, moments_of(block / blocks.count * blocks.count), x + first * N, rows,
                weights.mutable_data_ptr<T>() + first * N);
    });
  return {bound, log_w, weights};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const std::optional<Tensor>& grad, const Tensor& weights_, const Tensor& z_,
                                                    const Tensor& mu, const Tensor& log_var, bool normal_prior, bool need_z,
                                                    bool need_posterior) {
  const auto& k = kernels<T>().importance;
  const int64_t S = z_.size(0), N = z_.size(1), D = z_.size(2);
  const int64_t work = N * ((4 + kRead + (need_z ? kWrite : 0)) * D + 8);
  const Tensor z = as_contiguous(z_), weights = as_contiguous(weights_);
  const int64_t parts = std::clamp<int64_t>(S / kLeastRows, 1, task_count(S * work));
  const int64_t rows = std::clamp<int64_t>(ceil_div(S, parts), 1, kMostRows);
  const int64_t chunks = ceil_div(S, rows), n = need_posterior ? N : 0, packed = packed_size<T>(mu);
  const int64_t most = std::min(task_count(S * work) / std::max<int64_t>(chunks, 1), ceil_div(N, kLeastPoints));
  const int64_t spans = std::max<int64_t>(most, 1);  // of data points, each of which is a task of a chunk
  const int64_t sums = n * (2 * padded<T>(D) + 1) * std::max<int64_t>(chunks, 1);
  Arena<T> arena(Scratch::launch, packed, sums);
  T* const memory = arena.take(packed);
  Tensor dlog_w = empty(z, {grad ? S : 0, grad ? N : 0}), dz = empty(z, {need_z ? S : 0, need_z ? N : 0, need_z ? D : 0});
  Tensor dmu = empty(z, {n, need_posterior ? D : 0}), dlog_var = empty(z, {n, need_posterior ? D : 0});
  const ImportanceGradient<T> p{pack(memory, mu, log_var, normal_prior),
                                S,
                                rows,
                                z.const_data_ptr<T>(),
                                weights.const_data_ptr<T>(),
                                grad ? grad->const_data_ptr<T>() : nullptr,
                                grad ? grad->stride(0) : 0,
                                grad ? dlog_w.mutable_data_ptr<T>() : nullptr,
                                need_z ? dz.mutable_data_ptr<T>() : nullptr,
                                passes_cache(dz, D),
                                need_posterior ? arena.take(sums) : nullptr,
                                dmu.mutable_data_ptr<T>(),
                                dlog_var.mutable_data_ptr<T>()};
  in_parts(chunks * spans, rows * work / spans, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) k.backward(p, i / spans, {i % spans * N / spans, (i % spans + 1) * N / spans});
  });
  if (need_posterior)
    in_parts(N, chunks * 2 * D, [&](int64_t first, int64_t last) { k.merge_backward(p, first, last); });
  return {dz, dmu, dlog_var, dlog_w};
}

// Moments [4, N] of `state` and log_w together, in float64.
template <class T>
Tensor moments(const Tensor& log_w_, const Tensor& state_) {
  const Tensor log_w = as_contiguous(log_w_), state = as_contiguous(state_);
  const int64_t N = log_w.size(1), stride = padded<double>(N);
  const Blocks blocks(log_w.size(0), N, 1, 40 * N);
  const int64_t all = blocks.count + 1, size = kImportanceMoments * stride;
  Arena<double> arena(Scratch::launch, all * size);
  double* const memory = arena.take(all * size);  // that of the state, then one of each block
  std::fill_n(memory, size, 0.0);
  for (int64_t i = 0; i < kImportanceMoments; ++i) std::copy_n(state.const_data_ptr<double>() + i * N, N, memory + i * stride);
  blocks.each(N * 40, [&](int64_t block, int64_t first, int64_t rows) {
    kernels<T>().importance.wide_moments(log_w.const_data_ptr<T>() + first * N, rows, N, {1.0, 1.0},
                                         memory + (block + 1) * size, stride);
  });
  kernels<double>().importance.merge(memory, all, stride, 1.0);
  Tensor out = empty(state, {kImportanceMoments, N});
  for (int64_t i = 0; i < kImportanceMoments; ++i) std::copy_n(memory + i * stride, N, out.mutable_data_ptr<double>() + i * N);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> importance_fwd(const std::optional<Tensor>& z, const std::optional<Tensor>& mu,
                                                  const std::optional<Tensor>& log_var, const Tensor& log_px,
                                                  const std::optional<Tensor>& log_pz, double alpha, double elbo_weight,
                                                  int64_t groups, bool need_weights) {
  const auto f = log_px.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return f(z, mu, log_var, log_px, log_pz, alpha, elbo_weight, groups, need_weights);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> importance_bwd(const std::optional<Tensor>& grad, const Tensor& weights,
                                                          const Tensor& z, const Tensor& mu, const Tensor& log_var,
                                                          bool normal_prior, bool need_z, bool need_posterior) {
  const auto f = z.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return f(grad, weights, z, mu, log_var, normal_prior, need_z, need_posterior);
}

Tensor importance_moments(const Tensor& log_w, const Tensor& state) {
  return log_w.scalar_type() == ScalarType::Double ? moments<double>(log_w, state) : moments<float>(log_w, state);
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) {
  m.impl("importance_fwd", TORCH_BOX(&importance_fwd));
  m.impl("importance_bwd", TORCH_BOX(&importance_bwd));
  m.impl("importance_moments", TORCH_BOX(&importance_moments));
}

}  // namespace
}  // namespace latent_engine
