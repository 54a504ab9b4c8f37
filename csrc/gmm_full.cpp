// gmm_full_fwd, gmm_full_bwd and gmm_full_moments on CPU tensors: allocation, the cut into tasks, launch. Arguments are
// checked in kernels/gmm_full.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "binding.h"

namespace latent_engine {
namespace {

// The cut of N × K pairs into tasks: into chunks of rows, as long as their sums take no more than four times the memory of the
// inputs, then into splits of components, whose parts of dz stay within that too. `size` is that of a component's sums in the
// type of the inputs, or 0.
GmmGrid cut(int64_t N, int64_t K, int64_t D, int64_t size, bool split_components) {
  const int64_t tasks = std::clamp<int64_t>(N * K * (D * D + 16) / kTaskWork, 1, kMaxTasks);
  const int64_t most_chunks = size ? 4 * (N * D + K * D * D) / std::max<int64_t>(K * size, 1) : tasks;
  const int64_t most_splits = split_components ? std::clamp<int64_t>(4 * (N + K * D) / std::max<int64_t>(N, 1), 1, K + 1) : 1;
  GmmGrid grid;
  grid.rows = std::max<int64_t>(round_up(ceil_div(N, std::clamp<int64_t>(most_chunks, 1, tasks)), 16), 16);
  grid.chunks = ceil_div(N, grid.rows);
  const int64_t splits = std::clamp<int64_t>(tasks / std::max<int64_t>(grid.chunks, 1), 1, most_splits);
  grid.components = std::max<int64_t>(ceil_div(K, splits), 1);
  grid.splits = std::max<int64_t>(ceil_div(K, grid.components), 1);
  return grid;
}

template <class T>
struct Inputs {
  Tensor means, chol, log_weights;  // contiguous
  GmmFullMixture<T> mixture;
  GmmRows<T> rows;

  // `constants` [K] is filled.
  Inputs(T* constants, const Tensor& z, const Tensor& means_, const Tensor& chol_, const Tensor& log_weights_)
      : means(as_contiguous(means_)), chol(as_contiguous(chol_)), log_weights(as_contiguous(log_weights_)) {
    mixture = {means.size(0),           means.size(1), means.const_data_ptr<T>(), chol.const_data_ptr<T>(),
               log_weights.const_data_ptr<T>(), constants};
    rows = {z.size(0), z.const_data_ptr<T>(), {z.stride(0), z.stride(1)}, nullptr, nullptr, 0};
    in_parts(mixture.K, 16 * mixture.D,
             [&](int64_t first, int64_t last) { kernels<T>().gmm_full.prepare(mixture, first, last); });
  }
};

template <class T>
std::tuple<Tensor, std::optional<Tensor>> forward(const Tensor& z, const Tensor& means, const Tensor& chol,
                                                  const Tensor& log_weights, bool responsibilities) {
  const int64_t N = z.size(0), K = means.size(0);
  Arena<T> arena(Scratch::launch, K);
  const Inputs<T> in(arena.take(K), z, means, chol, log_weights);
  const GmmGrid grid = cut(N, K, means.size(1), 0, false);
  Tensor log_prob = empty(z, {N});
  std::optional<Tensor> resp;
  if (responsibilities) resp = empty(z, {N, K});
  const GmmFullForward<T> p{in.mixture, in.rows, grid, log_prob.mutable_data_ptr<T>(),
                            resp ? resp->mutable_data_ptr<T>() : nullptr};
  for_each_task_flushed(grid.chunks, [&](int64_t task) { kernels<T>().gmm_full.forward(p, task); });
  return {log_prob, resp};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// dz and the moments, given the log-density, or computing it into `value`.
template <class T>
Gradients backward(const Tensor* grad, const Tensor& z, const Tensor& means, const Tensor& chol, const Tensor& log_weights,
                   const T* log_prob, T* value, const std::optional<Tensor>& coef_, bool need_z, bool need_mixture) {
  const int64_t N = z.size(0), K = means.size(0), D = means.size(1), k = need_mixture ? K : 0, d = need_mixture ? D : 0;
  const int64_t size = need_mixture ? GmmFullMixture<T>{K, D}.moments_size() * sizeof(double) / sizeof(T) : 0;
  const GmmGrid grid = cut(N, K, D, size, !value);
  const int64_t rows = need_z ? (grid.splits - 1) * N * D : 0, moments = std::max<int64_t>(grid.chunks, 1) * K * size;
  Arena<T> arena(Scratch::launch, K, rows, moments);
  const Inputs<T> in(arena.take(K), z, means, chol, log_weights);
  const std::optional<Tensor> coef = coef_ ? std::optional<Tensor>(as_contiguous(*coef_)) : std::nullopt;
  Tensor dz = empty(z, {need_z ? N : 0, need_z ? D : 0});
  Tensor weight = empty(z, {k}, true), first = empty(z, {k, d}, true), second = empty(z, {k, d, d}, true);
  const GmmFullBackward<T> p{in.mixture,
                             in.rows,
                             grid,
                             grad ? grad->const_data_ptr<T>() : nullptr,
                             grad ? grad->stride(0) : 0,
                             log_prob,
                             value,
                             coef ? coef->const_data_ptr<T>() : nullptr,
                             need_z ? dz.mutable_data_ptr<T>() : nullptr,
                             arena.take(rows),
                             need_mixture ? reinterpret_cast<double*>(arena.take(moments)) : nullptr,
                             weight.mutable_data_ptr<double>(),
                             first.mutable_data_ptr<double>(),
                             second.mutable_data_ptr<double>()};
  for_each_task_flushed(grid.tasks(), [&](int64_t task) { kernels<T>().gmm_full.backward(p, task); });
  if (need_z && grid.splits > 1)
    in_parts(N * D, grid.splits, [&](int64_t begin, int64_t end) { kernels<T>().gmm_full.merge_rows(p, begin, end); });
  if (need_mixture)
    in_parts(K, (grid.chunks + 2) * D * (D + 1) / 2,
             [&](int64_t begin, int64_t end) { kernels<T>().gmm_full.merge_moments(p, begin, end); });
  return {dz, weight, first, second};
}

std::tuple<Tensor, std::optional<Tensor>> gmm_full_fwd(const Tensor& z, const Tensor& means, const Tensor& chol,
                                                       const Tensor& log_weights, bool responsibilities) {
  const auto f = z.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return f(z, means, chol, log_weights, responsibilities);
}

Gradients gmm_full_bwd(const Tensor& grad, const Tensor& z, const Tensor& means, const Tensor& chol, const Tensor& log_weights,
                       const Tensor& log_prob, const std::optional<Tensor>& coef, bool need_z, bool need_mixture) {
  const Tensor saved = as_contiguous(log_prob);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward<T>(&grad, z, means, chol, log_weights, saved.const_data_ptr<T>(), nullptr, coef, need_z, need_mixture);
  };
  return z.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

Gradients gmm_full_moments(const std::optional<Tensor>& weights, const Tensor& z, const Tensor& means, const Tensor& chol,
                           const Tensor& log_weights) {
  Tensor value = empty(z, {z.size(0)});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward<T>(weights ? &*weights : nullptr, z, means, chol, log_weights, nullptr, value.mutable_data_ptr<T>(),
                       std::nullopt, false, true);
  };
  Gradients sums = z.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  std::get<0>(sums) = value;
  return sums;
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) {
  m.impl("gmm_full_fwd", TORCH_BOX(&gmm_full_fwd));
  m.impl("gmm_full_bwd", TORCH_BOX(&gmm_full_bwd));
  m.impl("gmm_full_moments", TORCH_BOX(&gmm_full_moments));
}

}  // namespace
}  // namespace latent_engine
