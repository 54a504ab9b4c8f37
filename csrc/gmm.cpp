// The primitives of kernels/gmm.py on CPU tensors: allocation, the cut into tasks, launch. Arguments are checked there.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "binding.h"

namespace latent_engine {
namespace {

constexpr int64_t kFewTasks = 8;

// The cut of N × K pairs, each of `work` multiplications, into tasks: first into chunks of at least `rows` rows, with which
// the kernel is most efficient, then, if that leaves fewer tasks than the work is worth, into splits of components, and last
// into smaller chunks. The partial results, 2 K · D a chunk and N · D a split, stay within four times the size of the inputs
// each.
GmmGrid cut(int64_t N, int64_t K, int64_t work, int64_t rows, bool split_components) {
  const int64_t tasks = std::clamp<int64_t>(N * K * work / kTaskWork, 1, kMaxTasks);
  const int64_t most_chunks = std::max<int64_t>(2 * (N + K) / std::max<int64_t>(K, 1), 1);
  const int64_t most_splits =
      split_components ? std::clamp<int64_t>(K / 64, 1, 4 * (N + K) / std::max<int64_t>(N, 1) + 1) : 1;
  const int64_t wanted = std::max(std::clamp<int64_t>(N / rows, 1, tasks), std::min(tasks, kFewTasks) / most_splits);
  const int64_t chunks = std::min(wanted, most_chunks);
  GmmGrid grid;
  grid.rows = std::max<int64_t>(round_up(ceil_div(N, chunks), 64), 64);
  grid.chunks = ceil_div(N, grid.rows);
  const int64_t splits = std::clamp<int64_t>(tasks / std::max<int64_t>(grid.chunks, 1), 1, most_splits);
  grid.components = std::max(round_up(ceil_div(K, splits), kGmmTile), kGmmTile);
  grid.splits = std::max<int64_t>(ceil_div(K, grid.components), 1);
  return grid;
}

template <class T>
struct Inputs {
  GmmMixture<T> mixture;
  GmmRows<T> rows;
  std::optional<Tensor> labels, allowed;  // keep contiguous copies alive

  // Values of the packed mixture, for which the constructor takes the memory.
  static int64_t packed_size(const Tensor& means) { return round_up(means.size(0), kGmmTile) * (2 * means.size(1) + 1); }

  Inputs(T* packed, const Tensor& z, const Tensor& means, const Tensor& log_vars, const Tensor& log_weights,
         const std::optional<Tensor>& labels_, const std::optional<Tensor>& allowed_) {
    const int64_t K = means.size(0), D = means.size(1);
    if (labels_) labels = as_contiguous(*labels_);
    if (allowed_) allowed = as_contiguous(*allowed_);
    mixture = {K,
               D,
               means.const_data_ptr<T>(),
               log_vars.const_data_ptr<T>(),
               log_weights.const_data_ptr<T>(),
               {means.stride(0), means.stride(1)},
               {log_vars.stride(0), log_vars.stride(1)},
               log_weights.stride(0),
               packed,
               packed + round_up(K, kGmmTile) * 2 * D};
    rows = {z.size(0), z.const_data_ptr<T>(), {z.stride(0), z.stride(1)},
            labels ? labels->const_data_ptr<int64_t>() : nullptr, allowed ? allowed->const_data_ptr<bool>() : nullptr,
            allowed ? allowed->size(0) : K};
    in_parts(ceil_div(K, kGmmTile), 16 * kGmmTile * D,
             [&](int64_t first, int64_t last) { kernels<T>().gmm.pack(mixture, first, last); });
  }
};

template <class T>
std::tuple<Tensor, std::optional<Tensor>> forward(const Tensor& z, const Tensor& means, const Tensor& log_vars,
                                                  const Tensor& log_weights, const std::optional<Tensor>& labels,
                                                  const std::optional<Tensor>& allowed, bool responsibilities) {
  const int64_t N = z.size(0), K = means.size(0), packed = Inputs<T>::packed_size(means);
  const GmmGrid grid = cut(N, K, 2 * means.size(1) + 16, 64, !responsibilities);
  const int64_t partial = grid.splits > 1 ? grid.splits * N : 0;
  Arena<T> arena(Scratch::launch, packed, partial, partial);
  const Inputs<T> in(arena.take(packed), z, means, log_vars, log_weights, labels, allowed);
  Tensor log_prob = empty(z, {N});
  std::optional<Tensor> resp;
  if (responsibilities) resp = empty(z, {N, K});
  const GmmForward<T> p{in.mixture, in.rows, grid, log_prob.mutable_data_ptr<T>(),
                        resp ? resp->mutable_data_ptr<T>() : nullptr, arena.take(partial), arena.take(partial)};
  for_each_task_flushed(grid.tasks(), [&](int64_t task) { kernels<T>().gmm.forward(p, task); });
  if (grid.splits > 1) kernels<T>().gmm.merge_forward(p);
  return {log_prob, resp};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Of z, means, log_vars and log_weights, given the log-density, or computing it into `value`; if `plain`, Σ a δ and Σ a δ²
// instead of those of means and log_vars.
template <class T>
Gradients backward(const Tensor& grad, const Tensor& z, const Tensor& means, const Tensor& log_vars, const Tensor& log_weights,
                   const T* log_prob, T* value, const std::optional<Tensor>& labels, const std::optional<Tensor>& allowed,
                   const std::optional<Tensor>& coef_, bool need_z, bool need_mixture, bool plain = false) {
  const int64_t N = z.size(0), K = means.size(0), D = means.size(1), k = need_mixture ? K : 0, d = need_mixture ? D : 0;
  const GmmGrid grid = cut(N, K, 5 * D + 16, 512, !value);
  const int64_t packed = Inputs<T>::packed_size(means), rows = need_z ? (grid.splits - 1) * N * D : 0;
  const int64_t moments = round_up(k, kGmmTile) * (2 * D + 1) * std::max<int64_t>(grid.chunks, 1);
  Arena<T> arena(Scratch::launch, packed, rows, moments);
  const Inputs<T> in(arena.take(packed), z, means, log_vars, log_weights, labels, allowed);
  const std::optional<Tensor> coef = coef_ ? std::optional<Tensor>(as_contiguous(*coef_)) : std::nullopt;
  Tensor dz = empty(z, {need_z ? N : 0, need_z ? D : 0});
  Tensor dmeans = empty(z, {k, d}), dlog_vars = empty(z, {k, d}), dlog_weights = empty(z, {k});
  const GmmBackward<T> p{in.mixture,
                         in.rows,
                         grid,
                         grad.const_data_ptr<T>(),
                         grad.stride(0),
                         log_prob,
                         value,
                         coef ? coef->const_data_ptr<T>() : nullptr,
                         need_z ? dz.mutable_data_ptr<T>() : nullptr,
                         arena.take(rows),
                         need_mixture ? arena.take(moments) : nullptr,
                         dmeans.mutable_data_ptr<T>(),
                         dlog_vars.mutable_data_ptr<T>(),
                         dlog_weights.mutable_data_ptr<T>(),
                         plain};
  for_each_task_flushed(grid.tasks(), [&](int64_t task) { kernels<T>().gmm.backward(p, task); });
  if (need_z && grid.splits > 1)
    in_parts(N * D, grid.splits, [&](int64_t first, int64_t last) { kernels<T>().gmm.merge_rows(p, first, last); });
  if (need_mixture)
    in_parts(ceil_div(K, kGmmTile), grid.chunks * kGmmTile * (2 * D + 1),
             [&](int64_t first, int64_t last) { kernels<T>().gmm.merge_mixture(p, first, last); });
  return {dz, dmeans, dlog_vars, dlog_weights};
}

std::tuple<Tensor, std::optional<Tensor>> gmm_fwd(const Tensor& z, const Tensor& means, const Tensor& log_vars,
                                                  const Tensor& log_weights, const std::optional<Tensor>& labels,
                                                  const std::optional<Tensor>& allowed, bool responsibilities) {
  const auto f = z.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return f(z, means, log_vars, log_weights, labels, allowed, responsibilities);
}

Gradients gmm_bwd(const Tensor& grad, const Tensor& z, const Tensor& means, const Tensor& log_vars, const Tensor& log_weights,
                  const Tensor& log_prob, const std::optional<Tensor>& labels, const std::optional<Tensor>& allowed,
                  const std::optional<Tensor>& coef, bool need_z, bool need_mixture) {
  const Tensor saved = as_contiguous(log_prob);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward<T>(grad, z, means, log_vars, log_weights, saved.const_data_ptr<T>(), nullptr, labels, allowed, coef, need_z,
                       need_mixture);
  };
  return z.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
}

// The log-density and `backward` of it, with the logits computed once.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> both(const Tensor& grad, const Tensor& z, const Tensor& means,
                                                        const Tensor& log_vars, const Tensor& log_weights,
                                                        const std::optional<Tensor>& labels,
                                                        const std::optional<Tensor>& allowed, bool need_z, bool plain) {
  Tensor value = empty(z, {z.size(0)});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return backward<T>(grad, z, means, log_vars, log_weights, nullptr, value.mutable_data_ptr<T>(), labels, allowed,
                       std::nullopt, need_z, true, plain);
  };
  return std::tuple_cat(std::tuple(value), z.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gmm_fwd_bwd(const Tensor& grad, const Tensor& z, const Tensor& means,
                                                               const Tensor& log_vars, const Tensor& log_weights,
                                                               const std::optional<Tensor>& labels,
                                                               const std::optional<Tensor>& allowed) {
  return both(grad, z, means, log_vars, log_weights, labels, allowed, true, false);
}

Gradients gmm_moments(const Tensor& weights, const Tensor& z, const Tensor& means, const Tensor& log_vars,
                      const Tensor& log_weights) {
  const auto [log_prob, dz, first, second, counts] =
      both(weights, z, means, log_vars, log_weights, std::nullopt, std::nullopt, false, true);
  return {log_prob, counts, first, second};
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) {
  m.impl("gmm_fwd", TORCH_BOX(&gmm_fwd));
  m.impl("gmm_bwd", TORCH_BOX(&gmm_bwd));
  m.impl("gmm_fwd_bwd", TORCH_BOX(&gmm_fwd_bwd));
  m.impl("gmm_moments", TORCH_BOX(&gmm_moments));
}

}  // namespace
}  // namespace latent_engine
